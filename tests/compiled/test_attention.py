"""cuDNN's attention and kernels of other libraries in plans, on a machine without them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import zerojax as zj

pytestmark = pytest.mark.slow
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
BATCH, TIME, HEADS, WIDTH = 16, 1024, 4, 128
MODEL = HEADS * WIDTH
DEVICES = 8


def planned(loss, weights, batch, options=None):
    mesh = zj.make_mesh(topology=f"h100:1x{DEVICES}")
    zero = zj.Zero(mesh, 3, precision=zj.Precision(compute="bfloat16"))
    tx = optax.sgd(0.1)
    state = zero.abstract(lambda key: {"w": jnp.zeros(weights)}, tx, jax.random.key(0))
    step = zero.train_step(functools.partial(loss, mesh), tx, compiler_options=options)
    return step.plan(state, jax.ShapeDtypeStruct(batch, jnp.bfloat16), cache=False)


def test_the_operations_of_cudnns_attention_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import flash

    def loss(mesh, params, x):
        q, k, v = (h.reshape(*x.shape[:2], HEADS, WIDTH) for h in jnp.split(x @ params["w"], 3, -1))
        out = flash.attention(q, k, v, mesh).astype(jnp.float32)
        return zj.Loss(out.sum(), out.size)

    plan = planned(loss, (MODEL, 3 * MODEL), (BATCH, TIME, MODEL)).check()
    rows = BATCH // DEVICES
    products = 2 * 2 * rows * TIME * MODEL * 3 * MODEL  # forward, and the gradient of w
    attention = 7 * rows * HEADS * TIME * TIME * WIDTH  # 2 forward, 5 backward, half of each hidden
    assert plan.compute.flops == products + attention
    assert "custom calls" not in str(plan)


def test_a_kernel_of_a_library_that_is_not_loaded_is_named_as_uncounted():
    def loss(mesh, params, x):
        out = x @ params["w"]
        kernel = jax.ffi.ffi_call("of_a_library", jax.ShapeDtypeStruct((8, 256), out.dtype))
        spread = jax.shard_map(kernel, mesh=mesh, in_specs=P("data"), out_specs=P("data"),
                               check_vma=False)
        out = out + spread(jax.lax.stop_gradient(out))
        return zj.Loss((out.astype(jnp.float32)**2).sum(), out.size)

    plan = planned(loss, (256, 256), (64, 256), {"xla_gpu_mock_custom_calls": True})
    notes = [f.what for f in plan.findings if "custom calls" in f.what]
    assert len(notes) == 1 and "of_a_library (1 x per step)" in notes[0]
