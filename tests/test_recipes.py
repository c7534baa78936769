"""The program of each page of docs/recipes runs unchanged and ends in the numbers of plain jax.

Every program ends with the names `state` (a training state) and `value` (numbers that it computed).
It runs twice: with `zj.Zero` over eight devices, and with the reference `plain` in its place. Both
names must agree.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from jax.sharding import Mesh

import zerojax as zj

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "recipes"
TOLERANCES = {"between_hosts": 2e-2,  # rounds to bfloat16
              "float16": 3e-3,
              "ppo": 2e-4}  # 72 updates, each from the one before
QUICK = {"export_and_serve", "graphs", "learning_rate", "logging", "moving_average",
         "uneven_evaluation"}  # at most 3 s each
PAGES = sorted({path.stem for path in FOLDER.glob("*.md")} - {"index"})


def program(page):
    """Returns the only Python block of a page."""
    code, = re.findall(r"^```python\n(.*?)^```", (FOLDER / f"{page}.md").read_text(),
                       re.DOTALL | re.MULTILINE)
    return code


class Plain(zj.Zero):
    """A reference: `zero.jit` and its companions in plain jax; the other verbs are `Zero`'s."""

    def create(self, make):
        return make()

    def jit(self, fn=None, **options):
        return jax.jit(fn) if fn else jax.jit

    def gathered(self, fn, argnums=0):
        def run(model, *args):
            return fn(_model(model), *args)

        return run

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


def _model(given):
    """Returns the model of a state of `zero.init`, or what was given."""
    is_state = isinstance(given, zj.TrainState)
    return given.model.kind.join(given.params, given.model_state) if is_state else given


def _only(trainable, grads):
    """Returns the gradients of the leaves whose paths match, and None for the others."""

    def chosen(path, grad):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return grad if re.fullmatch(trainable, name) else None

    return jax.tree.map_with_path(chosen, grads)


def plain(mesh, stage=3, **settings):
    """Returns the reference on one device, at stage 0, for a program that asks for a `Zero`."""
    one = Mesh(np.reshape(jax.devices()[0], [1] * len(mesh.axis_names)), mesh.axis_names,
               axis_types=mesh.axis_types)
    return Plain(one, 0, **settings | {"secondary": None, "wire": zj.Wire()})


def run(page, make_zero, monkeypatch):
    """Returns the names `state` and `value` of a page's program, which sees eight devices."""
    devices = jax.devices()[:8]
    names = {"__name__": page}
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        patch.setattr(zj, "Zero", make_zero)
        exec(compile(program(page), f"{page}.md", "exec"), names)
    return names["state"], names["value"]


def leaves(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)
            if jnp.issubdtype(jnp.result_type(x), jnp.number)]


@pytest.mark.parametrize("stage", quick.some(range(4), (3).__eq__))
@pytest.mark.parametrize("page", quick.some(PAGES, QUICK.__contains__))
def test_ends_in_the_numbers_of_plain_jax(page, stage, monkeypatch, tmp_path):
    real = zj.Zero

    def zero(mesh, **settings):
        for name, least in (("secondary", 3), ("wire", 1)):
            if stage < least:
                settings.pop(name, None)
        return real(mesh, **settings | {"stage": stage})

    monkeypatch.chdir(tmp_path)  # some programs write files
    ours, theirs = run(page, zero, monkeypatch), run(page, plain, monkeypatch)
    specs = [str(x.sharding.spec) for x in jax.tree.leaves(ours[0])]
    assert any("data" in spec for spec in specs) == (stage > 0)
    tolerance = TOLERANCES.get(page, 2e-5)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-2, np.abs(b).max()))


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((\w+)\.md\) \|$", (FOLDER / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_program_is_about_a_screen_and_the_only_one(page):
    text = (FOLDER / f"{page}.md").read_text()
    assert text.count("```python") == 1
    assert len(program(page).splitlines()) <= 85
