"""Whatever a loss does with its parameters, which are plain arrays to it: in every stage, value and gradient of one device.

Each case is differentiated in a loop of the user's own, as one loss and (where it is a sum over examples) per device, and by
`train_step`.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import zerojax as zj
from zerojax.gather.models import Nnx, Tree

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
KEY = jax.random.key(0)
fit = lambda y: jnp.square(jnp.tanh(y) - 1).mean()


def _zero(stage, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1, **settings)


def _square():
    return {"w": jax.random.normal(KEY, (8, 8)), "b": jnp.linspace(-1.0, 1.0, 8)}


def _stack():
    layers, gate = jax.random.normal(KEY, (3, 8, 8)) / 3, jax.random.normal(KEY, (2, 8, 16))
    return {"layers": layers, "gate": gate, "out": jnp.ones((16, 8)) / 4}


def _apply(p, x):
    return jnp.tanh(x @ p["w"]) + p["b"][None]


@dataclasses.dataclass(frozen=True)
class Case:
    """`init()` makes the model, `loss(model, x)` is a mean over rows of x; `whole`: examples see each other."""

    init: Callable
    loss: Callable
    whole: bool = False


def penalty(loss):
    def penalised(model, x):
        grad = nnx.value_and_grad if isinstance(model, nnx.Module) else jax.value_and_grad
        value, grads = grad(loss)(model, x)
        return value + 10 * optax.global_norm(grads)

    return penalised


def hessian_vector(p, x):
    loss = lambda p: fit(_apply(p, x))
    _, product = jax.jvp(jax.grad(loss), (p,), (jax.tree.map(jnp.ones_like, p),))
    return loss(p) + optax.global_norm(product)


def per_example_norms(p, x):
    norms = jax.vmap(lambda row: optax.global_norm(jax.grad(lambda p: fit(_apply(p, row[None])))(p)))(x)
    return norms.mean()


def l2_by(choose):
    return lambda p, x: fit(_apply(p, x)) + choose(p)


PENALTIES = {
    "leaves": lambda p: sum(jnp.sum(w**2) for w in jax.tree.leaves(p) if w.ndim > 1),
    "keystr": lambda p: sum(jnp.sum(w**2) for k, w in jax.tree.leaves_with_path(p) if jax.tree_util.keystr(k).endswith("['w']")),
    "last key": lambda p: sum(jnp.sum(w**2) for k, w in jax.tree.leaves_with_path(p) if k[-1].key == "w"),
    "flatten_dict": lambda p: sum(jnp.sum(w**2) for k, w in traverse_util.flatten_dict(p).items() if k[-1] == "w"),
    "map_with_path": lambda p: sum(jax.tree.leaves(jax.tree.map_with_path(
        lambda k, w: jnp.sum(w**2) if k[-1] == jax.tree_util.DictKey("w") else 0.0, p))),
    "count": lambda p: 0.01 * sum(w.size for w in jax.tree.leaves(p)),
}


def lax_functions(p, x):
    w = jax.lax.cond(True, lambda w: w, lambda w: -w, p["w"])
    assert isinstance(w, jax.Array) and isinstance(p["w"], jax.Array)
    y = jax.lax.dot_general(x, jax.lax.mul(w, w), (((1,), (0,)), ((), ())))
    return fit(jax.lax.select(y > 0, y, jax.lax.exp(y)) + jax.lax.reshape(p["b"], (1, 8)))


def updated(p, x):
    return fit(x @ p["w"].at[0].set(1.0).at[:, 1].multiply(2.0))


def typed(p, x):
    def affine(w: Float[Array, "d d"], x):  # noqa: F722
        assert isinstance(w, Float[Array, "8 8"]) and not isinstance(w, Float[Array, "8"])
        return x @ w

    return fit(affine(p["w"], x))


@jax.custom_jvp
def _soft(p, x):
    return _apply(p, x)


@_soft.defjvp
def _soft_jvp(primals, tangents):
    out, tangent = jax.jvp(_apply, primals, tangents)
    return out, 2 * tangent


@jax.custom_vjp
def _clipped(p, x):
    return _apply(p, x)


_clipped.defvjp(lambda p, x: (_apply(p, x), (p, x)), lambda kept, ct: (jax.vjp(_apply, *kept)[1](jnp.clip(ct, -1e-3, 1e-3))))


def indexed(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["layers"][i])
    h = jax.nn.gelu(x @ p["gate"][0]) * (x @ p["gate"][1])
    h = h + jnp.concatenate([x @ w for w in jnp.split(p["gate"][-1], 2, axis=1)], 1)
    return fit(h @ p["out"]) + fit(p["layers"][0] @ p["layers"][0].T)


def indexed_by_a_value(p, x):
    best = jnp.argmax(p["layers"].sum((1, 2)))
    return fit(x @ p["layers"][best]) + fit(jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["layers"][i]), x))


@jax.jit
def _one_of(stack, i, x):
    return jnp.tanh(x @ jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False))


def called_for_each(p, x):
    """jax keeps one jaxpr for all calls of a jitted function."""
    for i in range(3):
        x = _one_of(p["layers"], i, x)
    return fit(x)


def scanned(p, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), h.mean()))
    x, means = jax.lax.scan(layer, x, p["layers"], reverse=True)
    return fit(x @ p["gate"][1] @ p["out"]) + means.sum()


def scanned_with_state(p, x):
    """An inner loop over time reads the weights of one layer; another weight is constant in both."""
    time = jnp.broadcast_to(x[None], (4, *x.shape))

    def layer(time, w):
        cell = lambda h, t: (jnp.tanh(h @ w + t @ p["gate"][0] @ p["out"]),) * 2
        return jax.lax.scan(cell, jnp.zeros_like(time[0]), time)[1], None

    return fit(jax.lax.scan(layer, time, p["layers"])[0][-1])


def tied(p, x):
    h = jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x)
    return fit(h @ jax.jit(jnp.transpose)(p["w"])) + fit(jnp.swapaxes(p["w"], 0, 1)[2])


def saved_by_name(p, x):
    policy = jax.checkpoint_policies.save_only_these_names("h")
    block = jax.checkpoint(lambda w, x: jnp.tanh(checkpoint_name(x @ w, "h")) @ w.T, policy=policy)
    return fit(block(p["w"], block(p["w"], x)))


def branches(p, x):
    return fit(jax.lax.switch(jnp.int32(x.sum() > 0), [lambda w: x @ w, lambda w: x @ w.T], p["w"]))


def while_loop(p, x):
    steps = jax.lax.while_loop(lambda n: (n < 9) & (jnp.abs(p["w"]).sum() * n < 300), lambda n: n + 1, 0)
    return fit(x @ p["w"]) * steps


def callback(p, x):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    shift = jax.pure_callback(lambda w: np.asarray(w).sum(0), shape, jax.lax.stop_gradient(p["w"]))
    return fit(x @ p["w"] + shift[None])


def returned(p, x):
    return p["b"][0] * 1.0 + 0.0 * x.mean()


class Vjp(nn.Module):
    @nn.compact
    def __call__(self, x):
        y, pull = nn.vjp(lambda module, x: module(x), nn.Dense(8, use_bias=False), x)
        return y + pull(jnp.ones_like(y))[1]


class Weight(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(16))(x)


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        turn = lambda variables: jax.tree.map(lambda w: w.T, variables)
        decoder = nn.map_variables(nn.Dense, "params", turn, turn, mutable=self.is_initializing(), init=self.is_initializing())
        return decoder(8, use_bias=False)(nn.relu(nn.Dense(16, use_bias=False)(x)))


class Recurrent(nn.Module):
    """An RNN in each of a scanned stack of layers."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(RecurrentLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        return layer(jnp.broadcast_to(x[:, None], (x.shape[0], 3, 8)), None)[0]


class RecurrentLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.RNN(nn.SimpleCell(8))(x), None


def linen(module):
    return Case(lambda: module.init(KEY, X), lambda variables, x: fit(module.apply(variables, x)))


def _linear():
    return nnx.Linear(8, 8, rngs=nnx.Rngs(0))


def set_item(module, x):
    module.kernel[...] = module.kernel[...] / jnp.linalg.norm(module.kernel[...])
    return fit(module(x))


def bridged():
    return nnx.bridge.ToNNX(Recurrent()).lazy_init(X, rngs=nnx.Rngs(0))


def _images(x):
    return x.reshape(-1, 2, 2, 2)


class Convolution(eqx.Module):
    conv: eqx.nn.Conv2d

    def __init__(self):
        self.conv = eqx.nn.Conv2d(2, 8, 2, key=KEY)

    def __call__(self, x):
        return jax.vmap(self.conv)(_images(x))


class Normed(eqx.Module):
    spectral: eqx.nn.SpectralNorm
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(8, 8, use_bias=False, key=KEY), "weight", key=KEY)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(*self.spectral(x, state))


def with_state(model_and_state, x):
    model, state = model_and_state
    y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    return zj.Loss(jnp.square(y - jnp.roll(x, 1, 1)).sum(), len(y), model_state=state)


HAIKU = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4)(hk.Conv2D(8, 2)(_images(x)).mean((1, 2)))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """An array that knows the names and sizes of its axes, and insists on them, as haliax's NamedArray does."""

    array: jax.Array
    axes: tuple = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.array, jax.Array):
            assert tuple(size for _, size in self.axes) == self.array.shape

    def dot(self, x):
        return Named(x @ self.array, (("rows", len(x)), self.axes[1]))


def named():
    return {"w": Named(jax.random.normal(KEY, (8, 16)), (("in", 8), ("out", 16)))}


CASES = {
    "gradient penalty": Case(_square, penalty(lambda p, x: fit(_apply(p, x)))),
    "hessian-vector product": Case(_square, hessian_vector),
    "per-example gradient norms": Case(_square, per_example_norms),
    **{f"penalty by {name}": Case(_square, l2_by(choose)) for name, choose in PENALTIES.items()},
    "lax": Case(_square, lax_functions),
    "w.at": Case(_square, updated),
    "jaxtyping": Case(_square, typed),
    "custom_jvp": Case(_square, lambda p, x: fit(_soft(p, x))),
    "custom_vjp": Case(_square, lambda p, x: _clipped(p, x).sum(1).mean(), whole=True),
    "w[i]": Case(_stack, indexed),
    "w[value]": Case(_stack, indexed_by_a_value),
    "jit(w, i)": Case(_stack, called_for_each),
    "scan": Case(_stack, scanned),
    "scan in scan": Case(_stack, scanned_with_state),
    "tied": Case(_square, tied),
    "names": Case(_square, saved_by_name),
    "switch": Case(_square, branches, whole=True),
    "while": Case(_square, while_loop),
    "callback": Case(_square, callback),
    "returned": Case(_square, returned),
    "nn.vjp": linen(Vjp()),
    "nn.WeightNorm": linen(Weight()),
    "nn.map_variables": linen(Transposed()),
    "rnn in scan": linen(Recurrent()),
    "nnx penalty": Case(_linear, penalty(lambda m, x: fit(m(x)))),
    "v[...] = value": Case(_linear, set_item),
    "nnx.SpectralNorm": Case(lambda: nnx.SpectralNorm(_linear(), rngs=nnx.Rngs(0)), lambda m, x: fit(m(x, update_stats=False))),
    "ToNNX": Case(bridged, lambda m, x: fit(m(x))),
    "equinox convolution": Case(Convolution, lambda m, x: fit(m(x))),
    "equinox state": Case(lambda: eqx.nn.make_with_state(Normed)(), with_state, whole=True),
    "haiku": Case(lambda: HAIKU.init(KEY, X), lambda p, x: fit(HAIKU.apply(p, x))),
    "named axes": Case(named, lambda p, x: fit(p["w"].dot(x).array)),
}


def one_device(case):
    """(value, flat gradients) by plain jax; the loss is a mean, or a `Loss`."""
    model = case.init()
    kind, params, state, _ = (Nnx if isinstance(model, nnx.Module) else Tree).split(model)

    def mean(params):
        result = case.loss(kind.join(params, state), X)
        return result.total / result.weight if isinstance(result, zj.Loss) else result

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    return value, jax.tree.leaves(grads)


def as_sum(case):
    """The loss as a sum over rows."""
    return lambda model, x: zj.Loss(case.loss(model, x) * x.shape[0], x.shape[0])


def close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1e-3, np.abs(b).max()))


SUMS = ("penalty", "hessian", "names", "returned")  # what they add to a mean is no mean over parts


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", CASES)
def test_a_loop_of_ones_own_equals_one_device(name, stage):
    case, zero = CASES[name], _zero(stage)
    value, grads = one_device(case)
    losses = [case.loss] if case.whole or any(word in name for word in SUMS) else [case.loss, as_sum(case)]
    run = lambda state, x: [zero.value_and_grad(loss)(state, x) for loss in losses]
    state = zero.init(case.init, optax.sgd(1.0))
    for ours, gradients in zero.jit(run, donate=False, compiler_options=oracle.QUICK)(state, X):
        np.testing.assert_allclose(ours, value, rtol=2e-5)
        close(gradients, grads)


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_one_device(name):
    case, zero = CASES[name], _zero(1 + 2 * (len(name) % 2))
    value, grads = one_device(case)
    state = zero.init(case.init, optax.sgd(1.0))
    born = jax.tree.map(np.asarray, jax.tree.leaves(state.params))
    state, metrics = zero.train_step(case.loss, optax.sgd(1.0), compiler_options=oracle.QUICK)(state, X)
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    close(state.params, [w - g for w, g in zip(born, grads, strict=True)])
