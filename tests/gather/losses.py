"""Losses of plain dicts of parameters, each of which reads them in another way."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its loss.

    Attributes:
      init: `init()` returns the model.
      loss: `loss(model, x)` returns a mean over the rows of `x`, or a `zj.Loss`.
      whole: The rows depend on each other, so that no device can take its own part of them.
    """

    init: Callable
    loss: Callable
    whole: bool = False


def fit(y):
    return jnp.square(jnp.tanh(y) - 1).mean()


def square():
    return {"w": jax.random.normal(KEY, (8, 8)), "b": jnp.linspace(-1.0, 1.0, 8)}


def stack():
    layers = jax.random.normal(KEY, (3, 8, 8)) / 3
    gate = jax.random.normal(KEY, (2, 8, 16))
    return {"layers": layers, "gate": gate, "out": jnp.ones((16, 8)) / 4}


def apply(p, x):
    return jnp.tanh(x @ p["w"]) + p["b"][None]


def fitted(p, x):
    return fit(apply(p, x))


def penalty(loss):
    """Returns the loss plus a penalty on the norm of its gradient."""

    def penalised(model, x):
        grad = nnx.value_and_grad if isinstance(model, nnx.Module) else jax.value_and_grad
        value, grads = grad(loss)(model, x)
        return value + 10 * optax.global_norm(grads)

    return penalised


def hessian_vector(p, x):
    def loss(p):
        return fitted(p, x)

    _, product = jax.jvp(jax.grad(loss), (p,), (jax.tree.map(jnp.ones_like, p),))
    return loss(p) + optax.global_norm(product)


def per_example_norms(p, x):
    def norm(row):
        return optax.global_norm(jax.grad(fitted)(p, row[None]))

    return jax.vmap(norm)(x).mean()


def l2_of_leaves(p):
    return sum(jnp.sum(w**2) for w in jax.tree.leaves(p) if w.ndim > 1)


def l2_by_keystr(p):
    return sum(jnp.sum(w**2) for path, w in jax.tree.leaves_with_path(p)
               if jax.tree_util.keystr(path).endswith("['w']"))


def l2_by_last_key(p):
    return sum(jnp.sum(w**2) for path, w in jax.tree.leaves_with_path(p) if path[-1].key == "w")


def l2_by_flatten_dict(p):
    flat = traverse_util.flatten_dict(p)
    return sum(jnp.sum(w**2) for path, w in flat.items() if path[-1] == "w")


def l2_by_map_with_path(p):
    def square_of(path, w):
        return jnp.sum(w**2) if path[-1] == jax.tree_util.DictKey("w") else 0.0

    return sum(jax.tree.leaves(jax.tree.map_with_path(square_of, p)))


def number_of_parameters(p):
    return 0.01 * sum(w.size for w in jax.tree.leaves(p))


PENALTIES = {
    "leaves": l2_of_leaves,
    "keystr": l2_by_keystr,
    "last key": l2_by_last_key,
    "flatten_dict": l2_by_flatten_dict,
    "map_with_path": l2_by_map_with_path,
    "count": number_of_parameters,
}


def penalised_by(choose):
    return lambda p, x: fitted(p, x) + choose(p)


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
def soft(p, x):
    return apply(p, x)


@soft.defjvp
def soft_jvp(primals, tangents):
    out, tangent = jax.jvp(apply, primals, tangents)
    return out, 2 * tangent


@jax.custom_vjp
def clipped(p, x):
    return apply(p, x)


def clipped_forward(p, x):
    return apply(p, x), (p, x)


def clipped_backward(kept, ct):
    _, pull = jax.vjp(apply, *kept)
    return pull(jnp.clip(ct, -1e-3, 1e-3))


clipped.defvjp(clipped_forward, clipped_backward)


def indexed(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["layers"][i])
    h = jax.nn.gelu(x @ p["gate"][0]) * (x @ p["gate"][1])
    h = h + jnp.concatenate([x @ w for w in jnp.split(p["gate"][-1], 2, axis=1)], 1)
    return fit(h @ p["out"]) + fit(p["layers"][0] @ p["layers"][0].T)


def indexed_by_a_value(p, x):
    best = jnp.argmax(p["layers"].sum((1, 2)))
    h = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["layers"][i]), x)
    return fit(x @ p["layers"][best]) + fit(h)


@jax.jit
def one_of(stack, i, x):
    return jnp.tanh(x @ jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False))


def called_for_each(p, x):
    """jax keeps one jaxpr for all calls of a jitted function."""
    for i in range(3):
        x = one_of(p["layers"], i, x)
    return fit(x)


def scanned(p, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), h.mean()))
    x, means = jax.lax.scan(layer, x, p["layers"], reverse=True)
    return fit(x @ p["gate"][1] @ p["out"]) + means.sum()


def scanned_twice(p, x):
    """An inner loop over time reads one layer's weights; another weight is constant in both."""
    inputs = jnp.broadcast_to(x[None], (4, *x.shape))

    def layer(inputs, w):
        def cell(h, t):
            h = jnp.tanh(h @ w + t @ p["gate"][0] @ p["out"])
            return h, h

        return jax.lax.scan(cell, jnp.zeros_like(inputs[0]), inputs)[1], None

    return fit(jax.lax.scan(layer, inputs, p["layers"])[0][-1])


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
    def unfinished(n):
        return (n < 9) & (jnp.abs(p["w"]).sum() * n < 300)

    return fit(x @ p["w"]) * jax.lax.while_loop(unfinished, lambda n: n + 1, 0)


def callback(p, x):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    w = jax.lax.stop_gradient(p["w"])
    shift = jax.pure_callback(lambda w: np.asarray(w).sum(0), shape, w)
    return fit(x @ p["w"] + shift[None])


def returned(p, x):
    return p["b"][0] * 1.0 + 0.0 * x.mean()


CASES = {
    "gradient penalty": Case(square, penalty(fitted)),
    "hessian-vector product": Case(square, hessian_vector),
    "per-example gradient norms": Case(square, per_example_norms),
    **{f"penalty by {name}": Case(square, penalised_by(choose))
       for name, choose in PENALTIES.items()},
    "lax": Case(square, lax_functions),
    "w.at": Case(square, updated),
    "jaxtyping": Case(square, typed),
    "custom_jvp": Case(square, lambda p, x: fit(soft(p, x))),
    "custom_vjp": Case(square, lambda p, x: clipped(p, x).sum(1).mean(), whole=True),
    "w[i]": Case(stack, indexed),
    "w[value]": Case(stack, indexed_by_a_value),
    "jit(w, i)": Case(stack, called_for_each),
    "scan": Case(stack, scanned),
    "scan in scan": Case(stack, scanned_twice),
    "tied": Case(square, tied),
    "names": Case(square, saved_by_name),
    "switch": Case(square, branches, whole=True),
    "while": Case(square, while_loop),
    "callback": Case(square, callback),
    "returned": Case(square, returned),
}
