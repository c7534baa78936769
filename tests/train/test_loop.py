"""A training loop of the user's own under `zero.jit`, with `zero.value_and_grad` and `zero.gathered`."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import zerojax as zj


def _zero(stage, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1, **settings)


def _tokens():
    return [np.random.default_rng(i).integers(0, zoo.VOCAB, (16, zoo.SEQ), np.int32) for i in range(5)]


NETS = {"rnn": zoo.Recurrent, "scanned": zoo.Transformer, "tied": lambda: zoo.Transformer(tied=True, remat=True)}
LOOPS = [("scanned", 0), ("scanned", 3), ("rnn", 1), ("rnn", 2), ("rnn", 3), ("tied", 1), ("tied", 3)]


@pytest.mark.parametrize("name, stage", LOOPS)
def test_flax_train_state_equals_one_device(name, stage, lowerings):
    net, tx, zero = NETS[name](), zoo.OPTIMIZERS["adamw"](), _zero(stage)
    judged = zoo._linen(net, zoo.mean_tokens, zoo._tokens)
    theirs, _, losses = oracle.train(judged, tx, _tokens())
    state = zero.create(lambda: TrainState.create(apply_fn=net.apply, params=judged.init()["params"], tx=tx))
    rest = jax.tree.map(lambda x: x.sharding, state)

    @zero.jit(compiler_options=oracle.QUICK)
    def train_step(state, tokens):
        loss = lambda params, tokens: zoo.mean_tokens(state.apply_fn({"params": params}, tokens), tokens)
        value, grads = zero.value_and_grad(loss)(state.params, tokens)
        return state.apply_gradients(grads=grads), value

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
def test_nnx_in_a_loop_of_ones_own(stage):
    zero, tx, x = _zero(stage), optax.adam(1e-2), np.ones((8, 8), np.float32)
    graphdef, _ = nnx.split(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))

    def make():
        params = nnx.to_pure_dict(nnx.split(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))[1])
        return {"params": params, "opt_state": tx.init(params)}

    def mean(params, x):
        return (nnx.merge(graphdef, params)(x) ** 2).mean()

    def update(state, x, value_and_grad):
        value, grads = value_and_grad(mean)(state["params"], x)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, value

    step, plain = zero.jit(lambda s, x: update(s, x, zero.value_and_grad)), jax.jit(lambda s, x: update(s, x, jax.value_and_grad))
    state, alone = zero.create(make), make()
    assert state["params"]["kernel"].sharding.spec == jax.P(None, "data")
    for _ in range(3):
        (state, ours), (alone, theirs) = step(state, x), plain(alone, x)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(state["params"]["kernel"], alone["params"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("name", ["scanned", "nnx", "dataclass"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_gathered_train_state_is_the_model(name, stage):
    model, zero, tx = zoo.MODELS[name](), _zero(stage), optax.sgd(0.1)
    state, batch = zero.init(model.init, tx), model.batch(16, 0)
    loss = zero.jit(zero.gathered(model.loss), donate=False)
    alone = model.loss(model.init(), batch)
    ours = loss(state, batch)
    np.testing.assert_allclose(ours.total / ours.weight, alone.total / alone.weight, rtol=1e-5)


class Twice(nn.Module):
    """Gives one read of its parameter to two functions that take arrays only."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (8, 8))
        return jax.lax.dot(jax.lax.dot(x, w), w)


def test_one_read_used_twice_by_jax_lax():
    zero, model, x = _zero(3), Twice(), np.ones((8, 8), np.float32)
    params = model.init(jax.random.key(0), x)
    grads = jax.grad(lambda p, x: model.apply(p, x).mean())
    step = zero.train_step(lambda variables, x: model.apply(variables, x).mean(), optax.sgd(1.0))
    state = zero.create(lambda: {"params": params})
    mean = zero.gathered(lambda p, x: model.apply(p, x).mean())
    ours = zero.jit(lambda state, x: jax.grad(mean)(state["params"], x), donate=False)
    np.testing.assert_allclose(ours(state, x)["params"]["w"], grads(params, x)["params"]["w"], rtol=1e-5, atol=1e-6)
    _, metrics = step(zero.init(lambda: params, optax.sgd(1.0)), x)
    np.testing.assert_allclose(metrics["loss"], model.apply(params, x).mean(), rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_parameters_are_arrays_to_jax_lax(stage):
    zero, tx, x = _zero(stage), optax.sgd(0.1), np.ones((8, 8), np.float32)
    init = lambda: {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}
    loss = lambda p, x: zj.Loss((jax.lax.dot(x, p["w"]) * p["b"][None]).sum(), x.shape[0])
    state, metrics = zero.train_step(loss, tx)(zero.init(init, tx), x)
    assert float(metrics["loss"]) == 8 * 16
    np.testing.assert_allclose(state.params["w"], np.full((8, 16), 0.9), rtol=1e-6)


def test_a_function_that_keeps_the_state_reads_it_without_donation():
    zero, model = _zero(3), nn.Dense(16)
    state = zero.create(lambda: {"params": model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]})
    predict = zero.jit(zero.gathered(model.apply), donate=False)
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    params = jax.tree.map(np.asarray, state["params"])
    for _ in range(2):
        np.testing.assert_allclose(predict(state, x), x @ params["kernel"] + params["bias"], rtol=1e-5, atol=1e-6)


def test_the_state_lies_where_it_lay_whatever_stage_made_it():
    """One checkpoint serves every stage: shardings follow the state that comes in."""
    make = lambda: {"params": {"w": jnp.ones((8, 16))}}
    mean = lambda p, x: (x @ p["w"]).mean()
    new = lambda zero, params, x: jax.tree.map(jnp.subtract, params, zero.value_and_grad(mean)(params, x)[1])
    loss = lambda zero: zero.jit(lambda state, x: {"params": new(zero, state["params"], x)})
    whole, spread = _zero(0).create(make), _zero(3).create(make)
    after = [loss(_zero(stage))(state, np.ones((8, 8), np.float32)) for stage, state in ((3, whole), (1, spread))]
    assert after[0]["params"]["w"].sharding.is_fully_replicated
    assert after[1]["params"]["w"].sharding.spec == jax.P(None, "data")
    np.testing.assert_allclose(*(s["params"]["w"] for s in after), rtol=1e-6)


def test_the_batch_is_checked_and_spread():
    zero = _zero(3)
    state = zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}})
    with pytest.raises(zj.BatchError, match="12 examples"):
        zero.jit(lambda s, x: x.sum(), donate=False)(state, np.ones((12, 8)))


def test_a_step_may_take_its_labels_out_of_the_batch():
    zero = _zero(3)

    @zero.jit
    def step(state, batch):
        def loss(params, batch):
            labels = batch.pop("labels")
            return jnp.square(batch["inputs"] @ params["w"] - labels).mean()

        value, _ = zero.value_and_grad(loss)(state["params"], batch)
        return state, (value, batch.pop("labels").sum())

    batch = {"inputs": np.ones((8, 8), np.float32), "labels": np.ones((8, 16), np.float32)}
    _, (value, total) = step(zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}}), batch)
    assert (float(value), float(total)) == (49.0, 128.0) and set(batch) == {"inputs", "labels"}


def test_the_function_is_traced_once_for_a_layout():
    zero, calls = _zero(3), []

    @zero.jit
    def step(state, x):
        calls.append(x.shape)
        return state, zero.value_and_grad(lambda p, x: (x @ p["w"]).mean())(state["params"], x)[0]

    state = zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}})
    for rows in (8, 8, 16):
        state, _ = step(state, np.ones((rows, 8), np.float32))
    assert calls == [(8, 8), (16, 8)]


def _bare(zero, state, x):
    return jax.value_and_grad(lambda p: (x @ p["w"].astype(jnp.bfloat16).T).mean())(state["params"])


def test_parameters_that_are_multiplied_bare_are_told_of():
    make = lambda: {"params": {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}, "opt_state": {"w": jnp.ones((8, 8))}}
    x, zero = np.ones((8, 8), np.float32), _zero(3)
    step = zero.jit(functools.partial(_bare, zero), donate=False)
    with pytest.warns(UserWarning, match=r"params/w are multiplied without having been gathered.*zero\.value_and_grad"):
        step(zero.create(make), x)
    whole = _zero(0)
    silent = [(zero, step), (whole, whole.jit(functools.partial(_bare, whole), donate=False)),
              (zero, zero.jit(lambda s, x: zero.gathered(_bare, 1)(zero, s, x)[0], donate=False)),
              (zero, zero.jit(lambda s, x: s["opt_state"]["w"] @ s["opt_state"]["w"] + s["params"]["w"].sum(), donate=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy, run in silent:
            run(policy.create(make), x)


def test_batches_in_other_arguments_whole_and_split_as_said():
    zero, make = _zero(3), lambda: {"params": {"w": jnp.ones((8, 16))}}
    x, y = np.ones((8, 8), np.float32), np.ones((3, 16), np.float32)
    seen = lambda *xs: [x.sharding.spec for x in xs]
    pair = zero.jit(lambda state, x, n, y: (x, y), donate=False, batch_argnums=(1, 3))
    assert seen(*pair(zero.create(make), x, 2, x)) == [P("data"), P("data")]
    named = zero.jit(lambda state, x, y: (x, y), donate=False, batch_argnums={1: P(None, "data"), 2: {"a": P("data"), "b": P()}})
    out, tree = named(zero.create(make), x, y={"a": x, "b": y})
    assert seen(out, tree["a"], tree["b"]) == [P(None, "data"), P("data"), P()]
    with pytest.raises(zj.BatchError, match="3 examples"):
        pair(zero.create(make), x, 2, y)
    predict = zero.jit(zero.gathered(lambda state, batch: (batch, state["params"]["w"].sum())[0]), donate=False)
    assert seen(predict(zero.create(make), batch=x)) == [P("data")]


def test_an_array_of_the_batchs_length_beside_it_is_not_split():
    """Nor is the batch then, unless that is insisted on."""
    zero, x, y = _zero(3), np.ones((16, 8), np.float32), np.arange(16.0, dtype=np.float32)
    loss = lambda p, x, y: zj.Loss(((x @ p["w"]).sum(1) - y).sum(), len(x))
    state = zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}})
    run = lambda zero, **options: zero.jit(lambda s, x, y: zero.value_and_grad(loss, **options)(s["params"], x, y)[0],
                                           donate=False, batch_argnums=(1, 2))(state, x, y)
    assert float(run(zero)) == float(run(zero, batch_argnums=(1, 2), accumulate=2)) == 128 - 7.5
    with pytest.raises(zj.BatchError, match=r"\(16,\).*batch_argnums"):
        run(zero, accumulate=2)
    with pytest.raises(zj.PolicyError, match=r"\(16,\).*batch_argnums"):
        run(_zero(3, gradients="per_device"))


def test_keys_differ_between_microbatches_and_parts():
    loss = lambda p, x, key: zj.Loss((x @ p["w"]).sum(), 1.0, {"u": (u := jax.random.uniform(key)), "u2": u * u})
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        for options, draws in (({"gradients": "global"}, 4), ({"gradients": "per_device"}, 8)):
            zero, accumulate = _zero(3, **options), 4 if options["gradients"] == "global" else 1
            run = zero.jit(lambda s, x, key, zero=zero, n=accumulate: zero.value_and_grad(loss, has_aux=True, accumulate=n)(
                s["params"], x, key)[0][1], donate=False)
            out = run(zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}}), np.ones((32, 8), np.float32), key)
            assert float(out.weight) == draws
            assert float(out.aux["u2"] / draws - (out.aux["u"] / draws) ** 2) > 1e-3


def test_aux_of_examples_comes_back_in_their_order():
    x = np.arange(32.0, dtype=np.float32)[:, None] * np.ones((1, 8), np.float32)
    loss = lambda p, x: (zj.Loss((x @ p["w"]).sum(), len(x)), {"rows": x[:, 0]})
    for settings, n in (({}, 1), ({}, 2), ({"gradients": "global"}, 4)):
        zero = _zero(3, **settings)
        run = zero.jit(lambda s, x, zero=zero, n=n: zero.value_and_grad(loss, has_aux=True, accumulate=n)(s["params"], x)[0][1])
        aux = run(zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}}), x)
        np.testing.assert_array_equal(aux["rows"], x[:, 0])
    scalar = lambda p, x: ((x @ p["w"]).mean(), x.max())
    with pytest.raises(zj.LossError, match=r"shape \(\), which is not of the 16 examples.*zj\.Loss"):
        zero.jit(lambda s, x: zero.value_and_grad(scalar, has_aux=True, accumulate=2)(s["params"], x))(
            zero.create(lambda: {"params": {"w": jnp.ones((8, 16))}}), x)


def test_states_of_several_models_are_laid_out_and_planned_as_one():
    def trained(seed):
        model = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)()
        params = model.init(jax.random.key(seed), jnp.ones((1, 8)), None)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))

    make = lambda: {"actor": trained(0), "critic": trained(1)}
    rows = _zero(3).layout(_zero(3).create(make)).rows
    kernels = {row.path: row.spec for row in rows if row.path.endswith("kernel")}
    assert len(kernels) == 6 and set(kernels.values()) == {P(None, None, "data")}  # no optimizer state along the scanned one
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"), 3, min_shard=1)

    @zero.jit
    def step(state, x):
        mean = lambda params, x: jnp.square(state["actor"].apply_fn({"params": params}, x, None)[0]).mean()
        new = {k: s.apply_gradients(grads=zero.value_and_grad(mean)(s.params, x)[1]) for k, s in state.items()}
        return new

    kinds = step.plan(zero.create(make), jax.ShapeDtypeStruct((8, 8), "float32")).memory.kinds
    assert kinds["parameters"] == 2 * 4 * (8 * 64 + 64) / 8 and kinds["optimizer state"] > 2 * kinds["parameters"]


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8)(x)), None


def _square():
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)) / 3, jnp.float32)}


ROWS = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
_fit = lambda p, x: jnp.square(jnp.tanh(x @ p["w"]) - 1).mean()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_derivatives_of_derivatives(stage):
    """Taken outside of the verbs: a penalty on the gradient's norm, one step of MAML, the gradient of a value."""
    zero, params = _zero(stage), _square()

    def outer(grad, value):
        step = lambda p: jax.tree.map(lambda w, g: w - 0.5 * g, p, grad(p, ROWS))
        return {"penalty": lambda p: optax.global_norm(grad(p, ROWS)), "maml": lambda p: value(step(p), ROWS),
                "value": lambda p: value(p, ROWS)}

    both = zero.value_and_grad(_fit)
    ways = [outer(jax.grad(zero.gathered(_fit)), zero.gathered(_fit)),
            outer(lambda p, x: both(p, x)[1], lambda p, x: both(p, x)[0])]
    for way in ways:
        for name, plain in outer(jax.grad(_fit), _fit).items():
            want = jax.grad(plain)(params)["w"]
            np.testing.assert_allclose(jax.jit(jax.grad(way[name]))(params)["w"], want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_gradients_per_device_are_not_differentiated_again():
    loss = lambda p, x: zj.Loss(_fit(p, x) * len(x), len(x))
    with pytest.raises(zj.PolicyError, match=r"differentiated itself.*zero\.gathered"):
        jax.grad(lambda p: _zero(3).value_and_grad(loss)(p, ROWS)[0])(_square())


def test_an_array_of_the_batchs_length_that_is_closed_over_is_not_split():
    zero, y = _zero(3), ROWS[:, ::-1] * 1.0

    def run(value_and_grad, x, y, **options):
        return value_and_grad(lambda p, x: zj.Loss(jnp.square(x @ p["w"] - y).sum(), x.shape[0]), **options)

    for rows in (8, 16):
        x, wanted = ROWS[:rows], y[:rows]
        ours = jax.jit(lambda p, x, y: run(zero.value_and_grad, x, y)(p, x))(_square(), x, wanted)
        mean = lambda p, x=x, wanted=wanted: jnp.square(x @ p["w"] - wanted).sum() / len(x)
        value, grads = jax.value_and_grad(mean)(_square())
        np.testing.assert_allclose(ours[0], value, rtol=1e-5)
        np.testing.assert_allclose(ours[1]["w"], grads["w"], rtol=1e-4, atol=1e-5)
    one = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(zj.BatchError, match="closes over an array of the batch's length"):  # one row would broadcast
        jax.jit(lambda p, x, y: run(one.value_and_grad, x, y, accumulate=16)(p, x))(_square(), ROWS, y)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_that_are_closed_over_differ_between_microbatches_and_parts(make):
    def masks(zero, key, **options):
        def loss(p, x):
            mask = jax.random.bernoulli(key, 0.5, x.shape)
            return zj.Loss(((x * mask) @ p["w"]).sum(), len(x)), mask

        return zero.value_and_grad(loss, has_aux=True, **options)(_square(), ROWS)[0][1]

    parts = np.asarray(jax.jit(lambda key: masks(_zero(3), key))(make(1))).reshape(8, 2, 8)
    assert (parts != parts[:1]).any((1, 2))[1:].all()
    micro = np.asarray(jax.jit(lambda key: masks(_zero(3, gradients="global"), key, accumulate=2))(make(1)))
    assert (micro[::2] != micro[1::2]).any()


def test_integers_that_look_like_a_key_are_none():
    h = lambda p, x, n: _fit(p, x) * n[0].astype(jnp.float32)
    run = jax.jit(lambda n: _zero(3).value_and_grad(h, accumulate=2)(_square(), ROWS, n)[0])
    np.testing.assert_allclose(run(jnp.array([100, 7], jnp.uint32)), 100 * _fit(_square(), ROWS), rtol=1e-5)


def test_aux_of_as_many_rows_as_a_part_is_no_array_of_examples():
    loss = lambda p, x: (zj.Loss(jnp.square(x @ p["w"]).sum(), len(x)), jnp.stack([x.sum(), x.max()]))
    aux = jax.jit(lambda p, x: _zero(3).value_and_grad(loss, has_aux=True)(p, x)[0][1])(_square(), ROWS)
    np.testing.assert_allclose(aux, [ROWS.sum(), ROWS.max()], rtol=1e-4)
    one = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(zj.LossError, match=r"shape \(2,\), which is not of the 2 examples"):
        jax.jit(lambda p, x: one.value_and_grad(loss, has_aux=True, accumulate=8)(p, x))(_square(), ROWS)


def test_complex_parameters():
    params = {"c": _square()["w"] + 1j * _square()["w"].T}
    h = lambda p, x: jnp.square(jnp.abs(x @ p["c"])).mean()
    want = jax.grad(h)(params, ROWS)["c"]
    for options in ({}, {"accumulate": 2}):
        got = jax.jit(lambda p, x, options=options: _zero(3).value_and_grad(h, **options)(p, x)[1]["c"])(params, ROWS)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_parameter_is_placed_as_the_argument_that_it_is():
    zero = _zero(3)
    state = {"average": jax.device_put(_square(), jax.NamedSharding(zero.mesh, P())), "params": zero.create(_square)}

    @zero.jit(donate=False)
    def grads(state, x):
        renamed = {"other": state["params"]["w"]}
        return zero.value_and_grad(_fit)(state["params"], x)[1]["w"], jax.grad(
            zero.gathered(lambda p, x: _fit({"w": p["other"]}, x)))(renamed, x)["other"]

    assert [g.sharding.spec for g in grads(state, ROWS)] == [P(None, "data")] * 2


def test_argument_numbers():
    zero = _zero(3)
    np.testing.assert_allclose(zero.gathered(lambda x, p: _fit(p, x), -1)(ROWS, _square()), _fit(_square(), ROWS), rtol=1e-5)
    with pytest.raises(zj.PolicyError, match="argnums=2, but the function was called with 2 arguments"):
        zero.gathered(_fit, 2)(_square(), ROWS)
    with pytest.raises(zj.LossError, match="has_aux=True, but the loss returned"):
        zero.value_and_grad(_fit, has_aux=True)(_square(), ROWS)
    with pytest.raises(zj.LossError, match="with has_aux=True"):
        zero.value_and_grad(lambda p, x: zj.Loss(_fit(p, x), 1.0, {"a": 1.0}))(_square(), ROWS)
