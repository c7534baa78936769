"""The programs of docs/recipes.md, unchanged, end in the state of plain jax at every stage."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx

import zerojax as zj

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
SETUP, *_ = BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def _heading(block):
    return re.findall(r"^## (.*)$", TEXT[:TEXT.index(block)], re.MULTILINE)[-1]


RECIPES = {_heading(block): block for block in BLOCKS[1:]}


@dataclasses.dataclass
class Plain:
    """The verbs of `Zero` in plain jax, on one device."""

    compute: str = "float32"

    def create(self, make):
        return make()

    def jit(self, fn=None, **options):
        return jax.jit(fn) if fn else jax.jit

    def gathered(self, fn):
        return fn

    def value_and_grad(self, loss_fn, *, accumulate=1, has_aux=False, batch_argnums=1, scale=None,
                       trainable=None):
        factor = 1.0 if scale is None else scale.value

        def mean(model, *args):
            result = loss_fn(model, *args)
            loss, aux = result if has_aux else (result, None)
            loss = loss if isinstance(loss, zj.Loss) else zj.Loss(loss, 1.0)
            return factor * loss.total, (loss.total, loss.weight, aux)

        def differentiated(model, batch, *rest):
            grad = nnx.grad if isinstance(model, nnx.Module) else jax.grad
            parts = [jax.tree.map(lambda x, i=i: x[i::accumulate], batch)
                     for i in range(accumulate)]
            results = [grad(mean, has_aux=True)(model, part, *rest) for part in parts]
            total = sum(aux[0] for _, aux in results)
            weight = sum(aux[1] for _, aux in results)
            grads = jax.tree.map(lambda *gs: sum(gs) / weight / factor, *(g for g, _ in results))
            grads = _only(trainable, grads) if trainable else grads
            aux = results[0][1][2]
            return ((total / weight, aux), grads) if has_aux else (total / weight, grads)

        return differentiated


def _only(trainable, grads):
    """Returns the gradients of the leaves whose paths match, and None for the others."""

    def chosen(path, grad):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return grad if re.fullmatch(trainable, name) else None

    return jax.tree.map_with_path(chosen, grads)


def run(recipe, zero):
    names = {}
    exec(SETUP, names)
    names["zero"] = zero
    exec(recipe, names)
    return names["state"], names["value"]


def leaves(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)
            if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("stage", quick.some(range(4), (3).__eq__))
@pytest.mark.parametrize("name", RECIPES)
def test_ends_in_the_state_of_plain_jax(name, stage):
    half = name == "float16"
    precision = zj.Precision(compute="float16" if half else None)
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), stage, min_shard=1, precision=precision)
    ours, theirs = run(RECIPES[name], zero), run(RECIPES[name], Plain())
    replicated = [x.sharding.is_fully_replicated for x in jax.tree.leaves(ours[0])]
    assert all(replicated) == (stage == 0)
    tolerance = 3e-3 if half else 2e-5
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-2, np.abs(b).max()))


def test_the_setup_is_a_program():
    names = {}
    eight = "zj.make_mesh(devices=__import__('jax').devices()[:8])"
    exec(SETUP.replace("zj.make_mesh()", eight), names)
    assert names["zero"].stage == 3
