"""Losses of linen, NNX, Equinox and Haiku modules that treat their parameters unusually."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from losses import KEY, Case, X, fit, penalty

import zerojax as zj


class Vjp(nn.Module):
    @nn.compact
    def __call__(self, x):
        y, pull = nn.vjp(lambda module, x: module(x), nn.Dense(8, use_bias=False), x)
        return y + pull(jnp.ones_like(y))[1]


class Weight(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(16))(x)


def transposed(variables):
    return jax.tree.map(lambda w: w.T, variables)


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        making = self.is_initializing()
        decoder = nn.map_variables(nn.Dense, "params", transposed, transposed, mutable=making,
                                   init=making)
        return decoder(8, use_bias=False)(nn.relu(nn.Dense(16, use_bias=False)(x)))


class RecurrentLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.RNN(nn.SimpleCell(8))(x), None


class Recurrent(nn.Module):
    """A scanned stack of layers with an RNN in each."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(RecurrentLayer, variable_axes={"params": 0}, split_rngs={"params": True},
                        length=2)()
        return layer(jnp.broadcast_to(x[:, None], (x.shape[0], 3, 8)), None)[0]


def linen(module):
    def loss(variables, x):
        return fit(module.apply(variables, x))

    return Case(lambda: module.init(KEY, X), loss)


def linear():
    return nnx.Linear(8, 8, rngs=nnx.Rngs(0))


def spectral():
    return nnx.SpectralNorm(linear(), rngs=nnx.Rngs(0))


def bridged():
    return nnx.bridge.ToNNX(Recurrent()).lazy_init(X, rngs=nnx.Rngs(0))


def set_item(module, x):
    module.kernel[...] = module.kernel[...] / jnp.linalg.norm(module.kernel[...])
    return fit(module(x))


def images(x):
    return x.reshape(-1, 2, 2, 2)


class Convolution(eqx.Module):
    conv: eqx.nn.Conv2d

    def __init__(self):
        self.conv = eqx.nn.Conv2d(2, 8, 2, key=KEY)

    def __call__(self, x):
        return jax.vmap(self.conv)(images(x))


class Normed(eqx.Module):
    spectral: eqx.nn.SpectralNorm
    norm: eqx.nn.BatchNorm

    def __init__(self):
        linear = eqx.nn.Linear(8, 8, use_bias=False, key=KEY)
        self.spectral = eqx.nn.SpectralNorm(linear, "weight", key=KEY)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(*self.spectral(x, state))


def with_state(model_and_state, x):
    model, state = model_and_state
    mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, state = mapped(x, state)
    return zj.Loss(jnp.square(y - jnp.roll(x, 1, 1)).sum(), len(y), model_state=state)


@hk.without_apply_rng
@hk.transform
def haiku_model(x):
    return hk.Linear(4)(hk.Conv2D(8, 2)(images(x)).mean((1, 2)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """An array that checks the names and sizes of its axes, as haliax's NamedArray does."""

    array: jax.Array
    axes: tuple = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.array, jax.Array):
            assert tuple(size for _, size in self.axes) == self.array.shape

    def dot(self, x):
        return Named(x @ self.array, (("rows", len(x)), self.axes[1]))


def named():
    return {"w": Named(jax.random.normal(KEY, (8, 16)), (("in", 8), ("out", 16)))}


def fitted(module, x):
    return fit(module(x))


CASES = {
    "nn.vjp": linen(Vjp()),
    "nn.WeightNorm": linen(Weight()),
    "nn.map_variables": linen(Transposed()),
    "rnn in scan": linen(Recurrent()),
    "nnx penalty": Case(linear, penalty(fitted)),
    "v[...] = value": Case(linear, set_item),
    "nnx.SpectralNorm": Case(spectral, lambda m, x: fit(m(x, update_stats=False))),
    "ToNNX": Case(bridged, fitted),
    "equinox convolution": Case(Convolution, fitted),
    "equinox state": Case(lambda: eqx.nn.make_with_state(Normed)(), with_state, whole=True),
    "haiku": Case(lambda: haiku_model.init(KEY, X), lambda p, x: fit(haiku_model.apply(p, x))),
    "named axes": Case(named, lambda p, x: fit(p["w"].dot(x).array)),
}
