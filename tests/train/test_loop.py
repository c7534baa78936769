"""A training loop of the user's own: `zero.create`, `zero.jit` and the verbs under it."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import quick
import zoo
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import zerojax as zj

ONES = np.ones((8, 8), np.float32)


def _zero(stage, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1, **settings)


def _make():
    return {"params": {"w": jnp.ones((8, 16))}}


def _mean(params, x):
    return (x @ params["w"]).mean()


def _tokens():
    return [np.random.default_rng(i).integers(0, zoo.VOCAB, (16, zoo.SEQ), np.int32)
            for i in range(5)]


def _tied():
    return zoo.Transformer(tied=True, remat=True)


NETS = {"rnn": zoo.Recurrent, "scanned": zoo.Transformer, "tied": _tied}
LOOPS = [("scanned", 0), ("scanned", 3), ("rnn", 1), ("rnn", 2), ("rnn", 3), ("tied", 1),
         ("tied", 3)]


@pytest.mark.parametrize("name, stage", quick.some(
    LOOPS, {("scanned", 3)}.__contains__))
def test_flax_train_state_equals_one_device(name, stage, lowerings):
    net, tx, zero = NETS[name](), zoo.OPTIMIZERS["adamw"](), _zero(stage)
    model = zoo._linen(net, zoo.mean_tokens, zoo._tokens)
    theirs, _, losses = oracle.train(model, tx, _tokens())

    def make():
        return TrainState.create(apply_fn=net.apply, params=model.init()["params"], tx=tx)

    @zero.jit(compiler_options=oracle.QUICK)
    def train_step(state, tokens):
        def loss(params, tokens):
            return zoo.mean_tokens(state.apply_fn({"params": params}, tokens), tokens)

        value, grads = zero.value_and_grad(loss)(state.params, tokens)
        return state.apply_gradients(grads=grads), value

    state = zero.create(make)
    rest = jax.tree.map(lambda x: x.sharding, state)
    ours, counts = [], []
    for tokens in zj.feed(_tokens(), zero):
        before = len(lowerings)
        state, value = train_step(state, tokens)
        counts.append(len(lowerings) - before)
        ours.append(float(value))
    assert counts[1:] == [0] * 4, "compiles once"
    assert jax.tree.map(lambda x: x.sharding, state) == rest
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("stage", [1, 3])
def test_an_nnx_loop_equals_one_device(stage):
    zero, tx = _zero(stage), optax.adam(1e-2)
    graphdef, _ = nnx.split(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))

    def make():
        params = nnx.to_pure_dict(nnx.split(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))[1])
        return {"params": params, "opt_state": tx.init(params)}

    def mean(params, x):
        return (nnx.merge(graphdef, params)(x) ** 2).mean()

    def update(value_and_grad, state, x):
        value, grads = value_and_grad(mean)(state["params"], x)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, value

    step = zero.jit(functools.partial(update, zero.value_and_grad))
    plain = jax.jit(functools.partial(update, jax.value_and_grad))
    state, alone = zero.create(make), make()
    assert state["params"]["kernel"].sharding.spec == P(None, "data")
    for _ in range(3):
        (state, ours), (alone, theirs) = step(state, ONES), plain(alone, ONES)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    kernels = (s["params"]["kernel"] for s in (state, alone))
    np.testing.assert_allclose(*kernels, atol=1e-6)


@pytest.mark.parametrize("name", quick.some(["scanned", "nnx", "dataclass"],
                                            {"scanned", "dataclass"}.__contains__))
@pytest.mark.parametrize("stage", quick.some((1, 3), (3).__eq__))
def test_a_gathered_train_state_is_the_model(name, stage):
    model, zero, tx = zoo.MODELS[name](), _zero(stage), optax.sgd(0.1)
    state, batch = zero.init(model.init, tx), model.batch(16, 0)
    loss = zero.jit(zero.gathered(model.loss), donate=False)
    alone = model.loss(model.init(), batch)
    ours = loss(state, batch)
    np.testing.assert_allclose(ours.total / ours.weight, alone.total / alone.weight, rtol=1e-5)


class Twice(nn.Module):
    """Passes one read of its parameter to two functions that take arrays only."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (8, 8))
        return jax.lax.dot(jax.lax.dot(x, w), w)


def test_one_read_used_twice_by_jax_lax():
    zero, model = _zero(3), Twice()
    params = model.init(jax.random.key(0), ONES)

    def mean(variables, x):
        return model.apply(variables, x).mean()

    @functools.partial(zero.jit, donate=False)
    def grads(state, x):
        return jax.grad(zero.gathered(mean))(state["params"], x)["params"]["w"]

    expected = jax.grad(mean)(params, ONES)["params"]["w"]
    ours = grads(zero.create(lambda: {"params": params}), ONES)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    step = zero.train_step(mean, optax.sgd(1.0))
    _, metrics = step(zero.init(lambda: params, optax.sgd(1.0)), ONES)
    np.testing.assert_allclose(metrics["loss"], mean(params, ONES), rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_parameters_are_arrays_to_jax_lax(stage):
    zero, tx = _zero(stage), optax.sgd(0.1)

    def init():
        return {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}

    def loss(p, x):
        return zj.Loss((jax.lax.dot(x, p["w"]) * p["b"][None]).sum(), x.shape[0])

    state, metrics = zero.train_step(loss, tx)(zero.init(init, tx), ONES)
    assert float(metrics["loss"]) == 8 * 16
    np.testing.assert_allclose(state.params["w"], np.full((8, 16), 0.9), rtol=1e-6)


def test_a_function_without_donation_reads_the_state_again_and_again():
    zero, model = _zero(3), nn.Dense(16)
    state = zero.create(lambda: model.init(jax.random.key(0), jnp.ones((1, 8))))
    predict = zero.jit(zero.gathered(model.apply), donate=False)
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    params = jax.tree.map(np.asarray, state["params"])
    expected = x @ params["kernel"] + params["bias"]
    for _ in range(2):
        np.testing.assert_allclose(predict(state, x), expected, rtol=1e-5, atol=1e-6)


def test_a_state_keeps_its_shardings_under_every_stage():
    """One checkpoint serves every stage: shardings follow the given state."""
    def after(stage, state):
        zero = _zero(stage)

        def step(state, x):
            grads = zero.value_and_grad(_mean)(state["params"], x)[1]
            return {"params": jax.tree.map(jnp.subtract, state["params"], grads)}

        return zero.jit(step)(state, ONES)["params"]["w"]

    whole, sharded = after(3, _zero(0).create(_make)), after(1, _zero(3).create(_make))
    assert whole.sharding.is_fully_replicated
    assert sharded.sharding.spec == P(None, "data")
    np.testing.assert_allclose(whole, sharded, rtol=1e-6)


def test_the_batch_is_checked():
    zero = _zero(3)
    with pytest.raises(zj.BatchError, match="12 examples"):
        zero.jit(lambda s, x: x.sum(), donate=False)(zero.create(_make), np.ones((12, 8)))


def test_a_step_may_take_its_labels_out_of_the_batch():
    zero = _zero(3)

    @zero.jit
    def step(state, batch):
        def loss(params, batch):
            labels = batch.pop("labels")
            return jnp.square(batch["inputs"] @ params["w"] - labels).mean()

        value, _ = zero.value_and_grad(loss)(state["params"], batch)
        return state, (value, batch.pop("labels").sum())

    batch = {"inputs": ONES, "labels": np.ones((8, 16), np.float32)}
    _, (value, total) = step(zero.create(_make), batch)
    assert (float(value), float(total)) == (49.0, 128.0)
    assert set(batch) == {"inputs", "labels"}


def test_the_function_is_traced_once_per_layout():
    zero, calls = _zero(3), []

    @zero.jit
    def step(state, x):
        calls.append(x.shape)
        return state, zero.value_and_grad(_mean)(state["params"], x)[0]

    state = zero.create(_make)
    for rows in (8, 8, 16):
        state, _ = step(state, np.ones((rows, 8), np.float32))
    assert calls == [(8, 8), (16, 8)]


def _make_with_opt_state():
    return {"params": {"w": jnp.ones((16, 8)), "b": jnp.ones(8)},
            "opt_state": {"w": jnp.ones((8, 8))}}


def _bare(state, x):
    def loss(p):
        return (x @ p["w"].astype(jnp.bfloat16).T).mean()

    return jax.value_and_grad(loss)(state["params"])


def test_parameters_that_are_multiplied_in_shards_are_warned_of():
    zero = _zero(3)
    text = r"params/w are multiplied without having been gathered.*zero\.value_and_grad"
    step = zero.jit(_bare, donate=False)
    with pytest.warns(UserWarning, match=text):
        step(zero.create(_make_with_opt_state), ONES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(zero.create(_make_with_opt_state), ONES)  # the warning comes once per trace


def _product_of_opt_state(state, x):
    return state["opt_state"]["w"] @ state["opt_state"]["w"] + state["params"]["w"].sum()


@pytest.mark.parametrize("stage, wrap", [
    (0, lambda zero: _bare), (3, lambda zero: zero.gathered(_bare)),
    (3, lambda zero: _product_of_opt_state)], ids=["whole", "gathered", "optimizer state"])
def test_other_products_are_not_warned_of(stage, wrap):
    zero = _zero(stage)
    run = zero.jit(wrap(zero), donate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(zero.create(_make_with_opt_state), ONES)


def _specs(*xs):
    return [x.sharding.spec for x in xs]


def test_batches_in_several_arguments():
    zero = _zero(3)
    pair = zero.jit(lambda state, x, n, y: (x, y), donate=False, batch_argnums=(1, 3))
    assert _specs(*pair(zero.create(_make), ONES, 2, ONES)) == [P("data"), P("data")]
    with pytest.raises(zj.BatchError, match="3 examples"):
        pair(zero.create(_make), ONES, 2, ONES[:3])


def test_batches_are_split_according_to_specs():
    zero, y = _zero(3), np.ones((3, 16), np.float32)
    specs = {1: P(None, "data"), 2: {"a": P("data"), "b": P()}}
    run = zero.jit(lambda state, x, y: (x, y), donate=False, batch_argnums=specs)
    x, tree = run(zero.create(_make), ONES, y={"a": ONES, "b": y})
    assert _specs(x, tree["a"], tree["b"]) == [P(None, "data"), P("data"), P()]


def test_a_gathered_function_gets_the_batch_by_name():
    zero = _zero(3)

    @zero.gathered
    def predict(state, batch):
        return batch, state["params"]["w"].sum()

    run = zero.jit(predict, donate=False)
    assert _specs(run(zero.create(_make), batch=ONES)[0]) == [P("data")]


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8)(x)), None


def _train_state(seed):
    model = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)()
    params = model.init(jax.random.key(seed), jnp.ones((1, 8)), None)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))


def _actor_and_critic():
    return {"actor": _train_state(0), "critic": _train_state(1)}


def test_states_of_several_models_are_laid_out_as_one():
    zero = _zero(3)
    rows = zero.layout(zero.create(_actor_and_critic)).rows
    kernels = {row.path: row.spec for row in rows if row.path.endswith("kernel")}
    assert len(kernels) == 6  # two parameters with two moments each
    assert set(kernels.values()) == {P(None, None, "data")}  # never the scanned dimension


def test_states_of_several_models_are_planned_as_one():
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), 3, min_shard=1)

    @zero.jit
    def step(state, x):
        def mean(params, x):
            return jnp.square(state["actor"].apply_fn({"params": params}, x, None)[0]).mean()

        return {name: s.apply_gradients(grads=zero.value_and_grad(mean)(s.params, x)[1])
                for name, s in state.items()}

    x = jax.ShapeDtypeStruct((8, 8), "float32")
    kinds = step.plan(zero.create(_actor_and_critic), x).memory.kinds
    assert kinds["parameters"] == 2 * 4 * (8 * 64 + 64) / 8
    assert kinds["optimizer state"] > 2 * kinds["parameters"]
