"""Trained and frozen parameters: frozen ones have no gradient, no optimizer state, and no norm."""

import functools
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import quick
from flax import nnx
from jax.sharding import PartitionSpec as P

import zerojax as zj

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
TX = optax.adamw(1e-2, weight_decay=0.1)
SGD = optax.sgd(0.1)
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
    """A layer whose input is multiplied by a table, which is floating but not trained."""

    table: jax.Array
    layer: eqx.nn.Linear

    def __init__(self):
        self.table = jnp.sin(jnp.arange(8.0))
        self.layer = eqx.nn.Linear(8, 8, key=KEY)

    def __call__(self, x):
        return self.layer(x * self.table)


def _tree():
    w = jax.random.normal(KEY, (3, 8, 8)) / 3
    return {"backbone": w, "lora": {"a": jnp.ones((3, 8, 2)) / 4, "b": w[:, :2]}}


@jax.checkpoint
def _layer(x, p):
    return jnp.tanh(x @ p["backbone"] + x @ p["lora"]["a"] @ p["lora"]["b"]), None


def _scanned(p, x):
    return jax.lax.scan(_layer, x, p)[0]


def _teaching():
    a, b = jax.random.normal(KEY, (2, 8, 8)) / 3
    return {"student": {"w": a}, "teacher": {"w": b, "v": b}}


def _distilled(p, x):
    target = jnp.tanh(x @ p["teacher"]["w"]) @ p["teacher"]["v"]
    return x @ p["student"]["w"] - target


def _call(module, x):
    return module(x)


def _nnx_lora():
    return NnxLora(nnx.Rngs(0))


CASES = {  # init, apply, trainable, a part of the paths of the trained parameters
    "linen LoRA": (lambda: LoraStack().init(KEY, X), LoraStack().apply, r".*/lora_.", "lora"),
    "nnx LoRA": (_nnx_lora, _call, nnx.LoRAParam, "lora"),
    "nnx by a filter": (_nnx_lora, _call, nnx.PathContains("second"), "second"),
    "tree, scanned": (_tree, _scanned, "lora/.*", "lora"),
    "teacher": (_teaching, _distilled, lambda path, x: path.startswith("student"), "student"),
    "buffers": (Rotated, lambda module, x: jax.vmap(module)(x), "layer/.*", "layer"),
}


def _mean(apply):
    return lambda model, x: jnp.square(apply(model, x) - 1).mean()


def _sum(apply):
    return lambda model, x: zj.Loss(jnp.square(apply(model, x) - 1).sum(), 8 * x.shape[0])


FORMS = {"one loss": _mean, "per device": _sum}


def _split(model):
    """Returns (parameters as a tree, function that puts parameters into the model)."""
    if isinstance(model, nnx.Module):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), lambda p: nnx.merge(graphdef, p, rest)
    if not isinstance(model, dict):
        return eqx.filter(model, eqx.is_array), lambda p: eqx.combine(p, model)
    if "params" in model:
        return model["params"], lambda p: {"params": p}
    return model, lambda p: p


def _by_path(tree):
    return {oracle.path_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def _put(leaves, flags, new):
    """Returns the leaves with `new` in place of those whose flag is True."""
    new = iter(new)
    return [next(new) if flag else x for x, flag in zip(leaves, flags, strict=True)]


def _one_device(name, steps=2, clip=0.05):
    """Returns (parameters by path, gradient norms); jax and optax train the chosen ones alone."""
    init, apply, _, part = CASES[name]
    params, join = _split(init())
    leaves, treedef = jax.tree.flatten(params)
    flags = [part in path for path in _by_path(params)]
    trained = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    tx = optax.chain(optax.clip_by_global_norm(clip), TX)
    opt_state = tx.init(trained)
    norms = []

    def loss(trained):
        return _mean(apply)(join(treedef.unflatten(_put(leaves, flags, trained))), X)

    for _ in range(steps):
        grads = jax.grad(loss)(trained)
        norms.append(optax.tree.norm(grads))
        updates, opt_state = tx.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
    return _by_path(treedef.unflatten(_put(leaves, flags, trained))), norms


def _close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=3e-6, err_msg=path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", quick.some(range(4), {1, 3}.__contains__))
@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_one_device_that_trains_the_chosen_parameters(name, stage, form):
    init, apply, trainable, _ = CASES[name]
    zero = _zero(stage)
    state = zero.init(init, TX, trainable=trainable)
    step = zero.train_step(FORMS[form](apply), TX, accumulate=1 + stage % 2, clip_norm=0.05,
                           compiler_options=oracle.QUICK)
    params, norms = _one_device(name)
    for expected in norms:
        state, metrics = step(state, X)
        np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)
    _close(_by_path(state.params), params)


@pytest.mark.parametrize("name", CASES)
def test_frozen_leaves_are_sharded_and_have_no_optimizer_state(name):
    init, _, trainable, part = CASES[name]
    state = _zero().init(init, TX, trainable=trainable)
    paths = _by_path(state.params)
    assert list(_by_path(state.opt_state[0].mu)) == [path for path in paths if part in path]
    large = [x for x in jax.tree.leaves(state.params) if x.size >= 64]
    assert large
    assert not any(x.sharding.is_fully_replicated for x in large)


def _as_given(name):
    """Returns (model, function of (model, x)) as a loop of the user's own has them."""
    init, apply, _, _ = CASES[name]
    model = init()
    if isinstance(model, Rotated):
        arrays, static = eqx.partition(model, eqx.is_array)
        return arrays, lambda p, x: apply(eqx.combine(p, static), x)
    if isinstance(model, dict) and "params" in model:
        return model["params"], lambda p, x: apply({"params": p}, x)
    return model, apply


@pytest.mark.parametrize("name", CASES)
def test_value_and_grad_has_gradients_of_trained_parameters_alone(name):
    init, apply, trainable, part = CASES[name]
    zero = _zero()
    params, join = _split(init())
    expected = _by_path(jax.grad(lambda p: _mean(apply)(join(p), X))(params))
    model, own = _as_given(name)

    @zero.jit(donate=False)
    def run(model, x):
        return zero.value_and_grad(_sum(own), trainable=trainable)(model, x)[1]

    grads = run(model, X)
    grads = nnx.to_pure_dict(grads) if isinstance(grads, nnx.State) else grads
    _close(_by_path(grads), {path: x for path, x in expected.items() if part in path})


def _dtypes(params):
    return {name: x.dtype.name for name, x in params.items()}


def _mixed():
    return {"params": {"base": jnp.ones((8, 8), jnp.bfloat16), "codes": jnp.ones((8, 8), jnp.int8),
                       "w": jnp.ones((8, 8))}}


def test_frozen_leaves_keep_their_dtype_and_are_computed_in_the_compute_dtype():
    seen = []

    def loss(variables, x):
        p = variables["params"]
        seen.append(_dtypes(p))
        return zj.Loss((x @ p["base"] @ (p["codes"].astype(x.dtype)) @ p["w"]).sum(), x.shape[0])

    zero = _zero(precision=zj.Precision(compute="float32"))
    state = zero.init(_mixed, SGD, trainable="w")
    assert _dtypes(state.params) == {"base": "bfloat16", "codes": "int8", "w": "float32"}
    state, _ = zero.train_step(loss, SGD)(state, X)
    assert seen[0] == {"base": "float32", "codes": "int8", "w": "float32"}
    assert state.params["codes"].sharding.spec == P(None, "data")
    assert state.params["base"].dtype == "bfloat16"


def test_a_skipped_step_changes_no_parameter():
    zero = _zero()
    state = zero.init(_tree, TX, trainable="lora/.*")
    before = _by_path(state.params)
    step = zero.train_step(lambda p, x: _scanned(p, x).mean() * jnp.inf, TX)
    state, metrics = step(state, X)
    assert int(metrics["skipped"]) == 1
    _close(_by_path(state.params), before)


@pytest.mark.parametrize("trainable, error, text", [
    ("lora", zj.LayoutError,
     r"trainable 'lora' matches none of 3 parameters .* the nearest are lora/[ab]"),
    (lambda path, x: False, zj.LayoutError,
     "selects none of the 3 parameters, such as backbone, lora/a, lora/b"),
    (nnx.LoRAParam, zj.PolicyError, "is not possible for a dict; write a regex for paths"),
    (3, zj.PolicyError, "trainable=3 is not possible for a dict; write a regex"),
    ("*a", zj.LayoutError, r"trainable='\*a' is not a regular expression: nothing to repeat"),
    ("params/lora/.*", zj.LayoutError, "match the whole path without params/"),
])
def test_invalid_choices(trainable, error, text):
    with pytest.raises(error, match=text):
        _zero().init(_tree, TX, trainable=trainable)


@pytest.mark.parametrize("trainable, unused", [
    ("layers_1/.*|lora/.*", ["layers_1/.*"]), ("lora/(a|b)|backbone", []), ("lora/[a|b]", []),
    ("head|tail|lora/a", ["head", "tail"]), ("(x|lora)/a", []),
])
def test_an_alternative_that_matches_nothing(trainable, unused):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _zero().abstract(_tree, TX, trainable=trainable)
    found = [str(w.message) for w in caught if "matches no parameter" in str(w.message)]
    wanted = [f"{pattern!r} matches no" for pattern in unused]
    assert all(part in text for part, text in zip(wanted, found, strict=True))


def test_integers_are_frozen_or_refused():
    with pytest.raises(zj.ModelError, match="parameter codes is of dtype int8, but trained "
                                            "parameters must be real and floating"):
        _zero().init(_mixed, TX)
    assert _zero().init(_mixed, TX, trainable="w").params["codes"].dtype == "int8"


def test_a_partial_is_a_choice():
    def contains(word, path, x):
        return word in path

    state = _zero().init(_tree, TX, trainable=functools.partial(contains, "lora"))
    assert list(_by_path(state.opt_state[0].mu)) == ["lora/a", "lora/b"]


def _matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params, is_leaf=lambda x: x is None)


def test_masks_see_none_for_frozen_parameters():
    tx = optax.adamw(1e-2, mask=_matrices)
    text = r"frozen parameters are None, so select with jax.tree.map"
    with pytest.raises(zj.PolicyError, match=text):
        _zero().init(_tree, tx, trainable="lora/.*")


LABELS = {"backbone": "frozen", "lora": {"a": "trained", "b": "trained"}}
STILL = optax.masked(optax.set_to_zero(), {"backbone": True, "lora": {"a": False, "b": False}})
BY_THE_OPTIMIZER = {
    "multi_transform": lambda: optax.multi_transform(
        {"trained": TX, "frozen": optax.set_to_zero()}, LABELS),
    "set_to_zero first": lambda: optax.chain(STILL, optax.sgd(optax.linear_schedule(1, 0, 9))),
    "set_to_zero last": lambda: optax.chain(optax.adam(1e-2), STILL),
}


@pytest.mark.parametrize("name", BY_THE_OPTIMIZER)
@pytest.mark.parametrize("form", FORMS)
def test_norms_are_of_what_the_optimizer_moves(name, form):
    zero, tx, clip = _zero(), BY_THE_OPTIMIZER[name](), 0.01
    state = zero.init(_tree, tx)
    backbone = np.asarray(state.params["backbone"])
    step = zero.train_step(FORMS[form](_scanned), tx, clip_norm=clip, compiler_options=oracle.QUICK)
    params, opt_state = _tree(), tx.init(_tree())
    for _ in range(3):
        grads = jax.grad(_mean(_scanned))(params, X)
        norm = optax.tree.norm(grads["lora"])
        grads = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1, clip / norm), grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, X)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(params["lora"]),
                                   rtol=1e-5)
    _close(_by_path(state.params), _by_path(params))
    np.testing.assert_array_equal(state.params["backbone"], backbone)


def test_an_optimizer_that_moves_nothing_still_has_norms():
    zero, tx = _zero(), optax.set_to_zero()
    _, metrics = zero.train_step(_sum(_scanned), tx)(zero.init(_tree, tx), X)
    grads = jax.grad(_mean(_scanned))(_tree(), X)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def _scaled():
    return {"w": jnp.ones((8, 8)), "s": jnp.float32(3)}


def test_a_scalar_that_is_never_moved_counts_in_no_norm():
    tx = optax.multi_transform({"t": SGD, "f": optax.set_to_zero()}, {"w": "t", "s": "f"})
    zero = _zero()

    def loss(p, x):
        return zj.Loss(jnp.square(x @ p["w"] * p["s"]).sum(), x.shape[0])

    state, metrics = zero.train_step(loss, tx)(zero.init(_scaled, tx), X)
    grads = jax.grad(lambda p: loss(p, X).total / 16)(_scaled())
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads["w"]), rtol=1e-5)
    assert float(state.params["s"]) == 3


@pytest.mark.parametrize("constant", [lambda: 0.0, lambda: jnp.zeros(())])
def test_an_update_may_be_a_constant(constant):
    tx = optax.stateless(lambda updates, params: {"w": updates["w"], "s": constant()})
    zero = _zero()
    step = zero.train_step(lambda p, x: (x @ p["w"] * p["s"]).mean(), tx)
    state, _ = step(zero.init(_scaled, tx), X)
    assert float(state.params["s"]) == 3


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("rows, warns", [(2**10, True), (2**8, False)])
def test_warns_of_a_large_array_that_the_loss_closes_over(rows, warns, make):
    teacher = make(np.random.default_rng(0).normal(size=(8, rows * 1024)).astype(np.float32))
    zero = _zero()

    def loss(p, x):
        return jnp.square(x @ p["w"] - (x @ teacher)[:, :8]).mean()

    state = zero.init(lambda: {"w": jnp.eye(8)}, SGD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zero.train_step(loss, SGD).lower(state, X)
    texts = [str(w.message) for w in caught if "closes over" in str(w.message)]
    assert bool(texts) == warns
    if warns:
        assert ("arrays of 32.0 MiB (the largest is float32[8, 1048576]), which become part of "
                "the program") in texts[0]
