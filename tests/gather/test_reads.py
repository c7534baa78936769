"""How often programs need a parameter whole, counted without the rewriting."""

import jax
import jax.numpy as jnp
import pytest

from zerojax.gather.reads import Sharded, count
from zerojax.plan.demand import Use

W = jax.ShapeDtypeStruct((8, 4, 4), "float32")
X = jnp.ones((2, 4))


def layer(x, w):
    return x @ w, None


def layers(w, body=layer, x=X):
    return jax.lax.scan(body, x, w)[0]


def nested(w):
    inner = jax.checkpoint(layers)
    return jax.checkpoint(lambda w: inner(w).sum())(w)


def in_a_loop(w):
    return jax.lax.fori_loop(0, 3, lambda i, x: x @ w[0], X)


def by_calls(w):
    first = jax.jit(lambda w: X @ w[0])
    return first(w) + jax.jit(lambda w: X @ w[0].T)(w)


def by_calls_at_indices(w):
    layer = jax.jit(lambda w, i: X @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False))
    return sum(layer(w, i) for i in range(3))


def by_a_layer_that_is_dropped(w):
    X @ w[0]
    return X @ w[1]


PROGRAMS = {
    "a loop over its layers": (layers, {1}, Use(1, 1)),
    "the same, rematerialised": (lambda w: layers(w, jax.checkpoint(layer)), {1},
                                 Use(2, 1, again=1)),
    "two loops": (lambda w: layers(w, x=layers(w)), {1}, Use(2, 2)),
    "a loop over a sharded dimension": (layers, {0}, Use(1, 1)),
    "remat within remat": (nested, {1}, Use(3, 1, again=2)),
    "two of eight layers": (lambda w: X @ w[0] + X @ w[1], {1}, Use(0.25, 0.25)),
    "one layer twice": (lambda w: X @ w[0] + X @ w[0], {1}, Use(0.125, 0.125)),
    "layers of a sharded dimension": (lambda w: X @ w[0] + X @ w[1], {0}, Use(1, 1)),
    "a constant of a loop": (in_a_loop, {1}, Use(1, 1)),
    "one layer by two calls": (by_calls, {1}, Use(0.125, 0.125)),
    "three layers by one call": (by_calls_at_indices, {1}, Use(0.375, 0.375)),
    "for a result that is dropped": (by_a_layer_that_is_dropped, {1}, Use(0.125, 0.125)),
    "never": (lambda w: X, {1}, Use(0, 0)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_reads_are_counted_per_scope(name):
    program, dims, use = PROGRAMS[name]
    assert count(jax.make_jaxpr(program)(W), [Sharded(W.shape, dims)]) == [use]


def test_pieces_that_are_too_small_are_not_gathered_alone():
    jaxpr = jax.make_jaxpr(lambda w: X @ w[0])(W)
    assert count(jaxpr, [Sharded(W.shape, {1}, least=17)]) == [Use(1, 1)]
    assert count(jaxpr, [Sharded(W.shape, {1}, least=0)]) == [Use(1, 1)]
    assert count(jaxpr, [None]) == [Use(0, 0)]
