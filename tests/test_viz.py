"""Plots: they show the numbers of the plan."""

import builtins
import re

import jax
import jax.numpy as jnp
import matplotlib
import optax
import pytest
from jax.sharding import PartitionSpec as P

import zerojax as zj

matplotlib.use("agg")


@pytest.fixture(scope="module")
def plan():
    zero = zj.Zero(zj.make_mesh(topology="h200:1x2"), min_shard=1)
    step = zero.train_step(lambda p, x: ((x @ p["a"]) @ p["b"]).mean(), optax.sgd(0.1))
    weights = {"a": jnp.ones((256, 256)), "b": jnp.ones((256, 256))}
    state = zero.abstract(lambda: weights, optax.sgd(0.1))
    return step.plan(state, jax.ShapeDtypeStruct((64, 256), jnp.float32))


def test_memory_bars_stack_to_the_peak(plan):
    ax = zj.viz.memory({"one": plan, "two": plan})
    tops = [round(bar.get_y() + bar.get_height(), 6) for bar in ax.patches]
    unit = 2**10 if plan.memory.peak < 2**20 else 2**20
    assert max(tops) == pytest.approx(plan.memory.peak / unit, rel=1e-6)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["one", "two"]
    assert "parameters" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_the_timeline_has_every_collective_of_a_computation(plan):
    ax = zj.viz.timeline(plan)
    lanes = [c.get_paths()[0].get_extents() for c in ax.collections]
    network = [box for box in lanes if box.y0 < 1]
    assert len(network) == sum(t.count for t in plan.communication)
    assert max(box.x1 for box in lanes) == pytest.approx(plan.compute.seconds * 1e3)


@pytest.mark.parametrize("spec, mesh, parts", [
    (P(), {"data": 8}, ["all of 0 to 7"]),
    (P(None, "data"), {"data": 4}, ["0", "1", "2", "3"]),
    (P("data"), {"replica": 2, "data": 4}, ["0, 4", "1, 5", "2, 6", "3, 7"]),
    (P("data", "model"), {"data": 2, "model": 2}, ["0", "1", "2", "3"]),
    (P("model", "data"), {"data": 2, "model": 2}, ["0", "2", "1", "3"]),
])
def test_a_leafs_parts_name_their_devices(spec, mesh, parts):
    assert [t.get_text() for t in zj.viz.leaf((8, 16), spec, mesh).texts] == parts


def test_a_scalar_is_one_part():
    assert [t.get_text() for t in zj.viz.leaf((), P(), {"data": 8}).texts] == ["all of 0 to 7"]


def test_an_unknown_computation(plan):
    entry = plan.program.entry
    with pytest.raises(zj.PolicyError, match=f"'nowhere'.*computations are .*{re.escape(entry)}"):
        zj.viz.timeline(plan, "nowhere")


def test_without_matplotlib_the_error_names_the_extra(plan, monkeypatch):
    real = builtins.__import__

    def none(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(zj.MissingExtraError, match=r"zerojax\[viz\]"):
        zj.viz.memory(plan)
