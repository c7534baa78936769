"""What is trained and what is frozen: one device's numbers, no gradient, no optimizer state, no part in any norm."""

import copy
import dataclasses
import functools
import pickle
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import zerojax as zj

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
TX = optax.adamw(1e-2, weight_decay=0.1)
KEY = jax.random.key(0)


def _zero(stage=3, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1, **settings)


class LoraDense(nn.Module):
    """A dense layer with an update of rank 2."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="base")(x)
        a = self.param("lora_a", nn.initializers.normal(0.5), (8, 2))
        b = self.param("lora_b", nn.initializers.normal(0.5), (2, 8))
        return y + x @ a @ b


class LoraStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.tanh(LoraDense()(x))
        return x


class NnxLora(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
        self.first.lora.lora_b[...] = jax.random.normal(KEY, (2, 8))
        self.second = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Rotated(eqx.Module):
    """A layer that turns its input by a table, which is floating and not to be trained."""

    table: jax.Array
    layer: eqx.nn.Linear

    def __init__(self):
        self.table, self.layer = jnp.sin(jnp.arange(8.0)), eqx.nn.Linear(8, 8, key=KEY)

    def __call__(self, x):
        return self.layer(x * self.table)


def _tree():
    w = jax.random.normal(KEY, (3, 8, 8)) / 3
    return {"backbone": w, "lora": {"a": jnp.ones((3, 8, 2)) / 4, "b": w[:, :2]}}


def _scanned(p, x):
    layer = lambda x, p: (jnp.tanh(x @ p["backbone"] + x @ p["lora"]["a"] @ p["lora"]["b"]), None)
    return jax.lax.scan(jax.checkpoint(layer), x, p)[0]


def _teaching():
    a, b = jax.random.normal(KEY, (2, 8, 8)) / 3
    return {"student": {"w": a}, "teacher": {"w": b, "v": b}}


def _distilled(p, x):
    target = jnp.tanh(x @ p["teacher"]["w"]) @ p["teacher"]["v"]
    return x @ p["student"]["w"] - target


CASES = {  # init, apply, trainable, what is trained
    "linen LoRA": (lambda: LoraStack().init(KEY, X), LoraStack().apply, r".*/lora_.", lambda path: "lora" in path),
    "nnx LoRA": (lambda: NnxLora(nnx.Rngs(0)), lambda m, x: m(x), nnx.LoRAParam, lambda path: "lora" in path),
    "nnx by a filter": (lambda: NnxLora(nnx.Rngs(0)), lambda m, x: m(x), nnx.PathContains("second"), lambda p: "second" in p),
    "tree, scanned": (_tree, _scanned, "lora/.*", lambda path: "lora" in path),
    "teacher": (_teaching, _distilled, lambda path, x: path.startswith("student"), lambda path: "student" in path),
    "buffers": (Rotated, lambda m, x: jax.vmap(m)(x), "layer/.*", lambda path: "layer" in path),
}
MEAN = lambda apply: lambda model, x: jnp.square(apply(model, x) - 1).mean()
SUM = lambda apply: lambda model, x: zj.Loss(jnp.square(apply(model, x) - 1).sum(), 8 * x.shape[0])
FORMS = {"one loss": MEAN, "per device": SUM}


def _split(init):
    model = init()
    if isinstance(model, nnx.Module):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), lambda p: nnx.merge(graphdef, p, rest)
    if isinstance(model, dict):
        return model.get("params", model), lambda p: {"params": p} if "params" in model else p
    return eqx.filter(model, eqx.is_array), lambda p: eqx.combine(p, model)


def _by_path(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
            for path, x in jax.tree.leaves_with_path(tree)}


def one_device(name, steps=2, clip=0.05):
    """(params by path, gradient norms): plain jax and optax, of what is trained alone."""
    init, apply, _, chosen = CASES[name]
    params, join = _split(init)
    flat, treedef = jax.tree.flatten(params)
    wanted = [chosen(path) for path in _by_path(params)]
    mine = [x for x, w in zip(flat, wanted, strict=True) if w]
    tx, norms = optax.chain(optax.clip_by_global_norm(clip), TX), []
    opt_state = tx.init(mine)

    def loss(mine):
        new = iter(mine)
        return MEAN(apply)(join(treedef.unflatten([next(new) if w else x for x, w in zip(flat, wanted, strict=True)])), X)

    for _ in range(steps):
        grads = jax.grad(loss)(mine)
        norms.append(optax.tree.norm(grads))
        updates, opt_state = tx.update(grads, opt_state, mine)
        mine = optax.apply_updates(mine, updates)
    new = iter(mine)
    return _by_path(treedef.unflatten([next(new) if w else x for x, w in zip(flat, wanted, strict=True)])), norms


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=3e-6, err_msg=path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_one_device_that_trains_those_alone(name, stage, form):
    init, apply, trainable, _ = CASES[name]
    zero = _zero(stage)
    state = zero.init(init, TX, trainable=trainable)
    step = zero.train_step(FORMS[form](apply), TX, accumulate=1 + stage % 2, clip_norm=0.05, compiler_options=oracle.QUICK)
    params, norms = one_device(name)
    for expected in norms:
        state, metrics = step(state, X)
        np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)
    close(_by_path(state.params), params)


@pytest.mark.parametrize("name", CASES)
def test_frozen_leaves_are_sharded_and_have_no_optimizer_state(name):
    init, _, trainable, chosen = CASES[name]
    state = _zero().init(init, TX, trainable=trainable)
    born = _by_path(state.params)
    assert list(_by_path(state.opt_state[0].mu)) == [path for path in born if chosen(path)]
    large = [x for x in jax.tree.leaves(state.params) if x.size >= 64]
    assert large and not any(x.sharding.is_fully_replicated for x in large)


@pytest.mark.parametrize("name", CASES)
def test_a_loop_of_ones_own_has_gradients_of_what_is_trained(name):
    init, apply, trainable, chosen = CASES[name]
    zero = _zero()
    params, join = _split(init)
    expected = _by_path(jax.grad(lambda p: MEAN(apply)(join(p), X))(params))
    run = lambda model, x: zero.value_and_grad(SUM(apply), trainable=trainable)(model, x)[1]
    if isinstance(model := init(), dict) and "params" in model:  # a loop of one's own is given parameters
        run = lambda p, x: zero.value_and_grad(lambda p, x: SUM(apply)({"params": p}, x), trainable=trainable)(p, x)[1]
        model = model["params"]
    model = eqx.filter(model, eqx.is_array) if isinstance(model, Rotated) else model
    if isinstance(model, Rotated):
        static = eqx.filter(init(), eqx.is_array, inverse=True)
        run = lambda p, x: zero.value_and_grad(lambda p, x: SUM(apply)(eqx.combine(p, static), x), trainable=trainable)(p, x)[1]
    grads = zero.jit(run, donate=False)(model, X)
    pure = nnx.to_pure_dict(grads) if isinstance(grads, nnx.State) else grads
    close(_by_path(pure), {path: x for path, x in expected.items() if chosen(path)})


def test_frozen_leaves_stay_in_their_dtype_and_are_computed_in_the_steps():
    made = lambda: {"base": jnp.ones((8, 8), jnp.bfloat16), "codes": jnp.ones((8, 8), jnp.int8), "w": jnp.ones((8, 8))}
    init, seen = lambda: {"params": made()}, []

    def loss(variables, x):
        p = variables["params"]
        seen.append({k: v.dtype.name for k, v in p.items()})
        return zj.Loss((x @ p["base"] @ (p["codes"].astype(x.dtype)) @ p["w"]).sum(), x.shape[0])

    zero = _zero(precision=zj.Precision(compute="float32"))
    state = zero.init(init, optax.sgd(0.1), trainable="w")
    assert {k: v.dtype.name for k, v in state.params.items()} == {"base": "bfloat16", "codes": "int8", "w": "float32"}
    state, _ = zero.train_step(loss, optax.sgd(0.1))(state, X)
    assert seen[0] == {"base": "float32", "codes": "int8", "w": "float32"}
    assert state.params["codes"].sharding.spec == P(None, "data") and state.params["base"].dtype == "bfloat16"


def test_a_step_that_is_skipped_leaves_everything():
    zero = _zero()
    state = zero.init(_tree, TX, trainable="lora/.*")
    born = _by_path(state.params)
    loss = lambda p, x: _scanned(p, x).mean() * jnp.inf
    state, metrics = zero.train_step(loss, TX)(state, X)
    assert int(metrics["skipped"]) == 1
    close(_by_path(state.params), born)


@pytest.mark.parametrize("trainable, error, text", [
    ("lora", zj.LayoutError, r"trainable 'lora' matches none of 3 parameters .* the nearest are lora/[ab]"),
    (lambda path, x: False, zj.LayoutError, "chooses none of 3 parameters"),
    (nnx.LoRAParam, zj.PolicyError, "of a dict: write a regex of paths"),
    (3, zj.PolicyError, "trainable=3, of a dict: write a regex"),
])
def test_what_cant_be_chosen(trainable, error, text):
    with pytest.raises(error, match=text):
        _zero().init(_tree, TX, trainable=trainable)


def test_integers_are_frozen_or_refused():
    init = lambda: {"params": {"codes": jnp.ones((8, 8), jnp.int8), "w": jnp.ones((8, 8))}}
    with pytest.raises(zj.ModelError, match="parameter codes is of dtype int8; what is trained is real and floating"):
        _zero().init(init, TX)
    assert _zero().init(init, TX, trainable="w").params["codes"].dtype == "int8"


@pytest.mark.parametrize("form", FORMS)
def test_paths_may_keep_a_dtype_of_their_own(form):
    init = lambda: {"router": jnp.eye(8), "w": jnp.eye(8)}
    seen = {}

    def apply(p, x):
        seen.update({k: v.dtype.name for k, v in p.items()})
        return (jax.nn.softmax(x @ p["router"]).astype(p["w"].dtype) @ p["w"]).astype(jnp.float32)

    precision = zj.Precision(params="bfloat16", compute="bfloat16", keep={"router": "float32"})
    zero = _zero(precision=precision)
    state = zero.init(init, optax.sgd(0.1))
    assert {k: v.dtype.name for k, v in state.params.items()} == {"router": "float32", "w": "bfloat16"}
    zero.train_step(FORMS[form](apply), optax.sgd(0.1))(state, X)
    assert seen == {"router": "float32", "w": "bfloat16"}


@pytest.mark.parametrize("keep, error, text", [
    ({"routers": "float32"}, zj.LayoutError, "Precision.keep 'routers' matches none of 2 parameters"),
    ({"(": "float32"}, zj.PolicyError, r"Precision.keep '\(' is no regular expression"),
    ({"router": "float8"}, zj.PolicyError, "no such dtype here"),
    ({"router": "float16"}, zj.PolicyError, "overflow"),
])
def test_dtypes_that_cant_be_kept(keep, error, text):
    with pytest.raises(error, match=text):
        _zero(precision=zj.Precision(keep=keep)).init(lambda: {"router": jnp.eye(8), "w": jnp.eye(8)}, optax.sgd(0.1))


LABELS = {"backbone": "frozen", "lora": {"a": "trained", "b": "trained"}}
FROZEN = jax.tree.map(lambda label: label == "frozen", LABELS)
BY_THE_OPTIMIZER = {
    "multi_transform": lambda: optax.multi_transform({"trained": TX, "frozen": optax.set_to_zero()}, LABELS),
    "set_to_zero before": lambda: optax.chain(optax.masked(optax.set_to_zero(), FROZEN), optax.sgd(optax.linear_schedule(1, 0, 9))),
    "set_to_zero behind": lambda: optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), FROZEN)),
}


@pytest.mark.parametrize("name", BY_THE_OPTIMIZER)
@pytest.mark.parametrize("form", FORMS)
def test_norms_are_of_what_the_optimizer_moves(name, form):
    zero, tx, clip = _zero(), BY_THE_OPTIMIZER[name](), 0.01
    state = zero.init(_tree, tx)
    born = np.asarray(state.params["backbone"])
    step = zero.train_step(FORMS[form](_scanned), tx, clip_norm=clip, compiler_options=oracle.QUICK)
    params, opt_state = _tree(), tx.init(_tree())
    for _ in range(3):
        grads = jax.grad(lambda p: MEAN(_scanned)(p, X))(params)
        norm = optax.tree.norm(grads["lora"])
        grads = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1, clip / norm), grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, X)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(params["lora"]), rtol=1e-5)
    close(_by_path(state.params), _by_path(params))
    np.testing.assert_array_equal(state.params["backbone"], born)


def test_an_optimizer_that_moves_nothing_still_has_norms():
    zero, tx = _zero(), optax.set_to_zero()
    _state, metrics = zero.train_step(SUM(_scanned), tx)(zero.init(_tree, tx), X)
    grads = jax.grad(lambda p: MEAN(_scanned)(p, X))(_tree())
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("rows, told", [(2**10, True), (2**8, False)])
def test_a_large_array_that_the_loss_closes_over_is_told(rows, told, make):
    teacher = make(np.random.default_rng(0).normal(size=(8, rows * 1024)).astype(np.float32))
    zero, tx = _zero(), optax.sgd(0.1)
    step = zero.train_step(lambda p, x: jnp.square(x @ p["w"] - (x @ teacher)[:, :8]).mean(), tx)
    state = zero.init(lambda: {"w": jnp.eye(8)}, tx)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.lower(state, X)
    text = [str(w.message) for w in caught if "closes over" in str(w.message)]
    assert bool(text) == told
    assert not told or "arrays of 32.0 MiB, the largest float32[8, 1048576]: they are part of the program" in text[0]


def test_a_frozen_scalar_counts_in_no_norm():
    init = lambda: {"w": jnp.ones((8, 8)), "s": jnp.float32(3)}
    tx = optax.multi_transform({"t": optax.sgd(0.1), "f": optax.set_to_zero()}, {"w": "t", "s": "f"})
    loss = lambda p, x: zj.Loss(jnp.square(x @ p["w"] * p["s"]).sum(), x.shape[0])
    zero = _zero()
    state, metrics = zero.train_step(loss, tx)(zero.init(init, tx), X)
    grads = jax.grad(lambda p: jnp.square(X @ p["w"] * p["s"]).sum() / 16)(init())
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads["w"]), rtol=1e-5)
    assert float(state.params["s"]) == 3


@pytest.mark.parametrize("zero_of", [lambda u: 0.0, lambda u: jnp.zeros(())])
def test_an_update_that_is_a_constant(zero_of):
    tx = optax.stateless(lambda u, p: {"w": u["w"], "s": zero_of(u)})
    zero = _zero()
    state = zero.init(lambda: {"w": jnp.ones((8, 8)), "s": jnp.float32(3)}, tx)
    state, _ = zero.train_step(lambda p, x: (x @ p["w"] * p["s"]).mean(), tx)(state, X)
    assert float(state.params["s"]) == 3


@pytest.mark.parametrize("variables", [True, False])
def test_a_dtype_by_path_in_a_loop_of_ones_own(variables):
    seen, zero = {}, _zero(precision=zj.Precision(compute="bfloat16", keep={"router/.*": "float32"}))
    params = {"router": {"kernel": jnp.eye(8)}, "w": jnp.eye(8)}

    def loss(tree, x):
        p = tree["params"] if variables else tree
        seen.update(router=p["router"]["kernel"].dtype.name, w=p["w"].dtype.name)
        return (x @ p["router"]["kernel"] @ p["w"]).mean()

    zero.jit(zero.value_and_grad(loss), donate=False)({"params": params} if variables else params, X)
    assert seen == {"router": "float32", "w": "bfloat16"}
    with pytest.raises(zj.LayoutError, match=r"Precision.keep 'rooter' matches none"):
        _zero(precision=zj.Precision(keep={"rooter": "float32"})).create(lambda: {"params": {"router": jnp.eye(8)}})


def test_a_precision_is_a_plain_value():
    precision = zj.Precision(compute="bfloat16", keep={"router/.*": "float32"})
    assert pickle.loads(pickle.dumps(precision)) == copy.deepcopy(precision) == precision
    assert dataclasses.asdict(precision)["keep"] == (("router/.*", "float32"),)
    assert hash(precision) == hash(copy.deepcopy(precision))


def test_a_partial_chooses():
    chosen = functools.partial(lambda word, path, x: word in path, "lora")
    state = _zero().init(_tree, TX, trainable=chosen)
    assert list(_by_path(state.opt_state[0].mu)) == ["lora/a", "lora/b"]


def test_masks_see_none_for_what_is_frozen():
    tx = optax.adamw(1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p, is_leaf=lambda x: x is None))
    with pytest.raises(zj.PolicyError, match=r"frozen ones are None: choose with jax.tree.map"):
        _zero().init(_tree, tx, trainable="lora/.*")
