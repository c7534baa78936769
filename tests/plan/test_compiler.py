"""What goes wrong in the process that compiles, or before it, is an error here that says what to
do."""

import functools
import os
import re
import stat
import sys
from importlib.metadata import PackageNotFoundError

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.layout import gpus, topology
from zerojax.plan import cache, compiler


@pytest.fixture
def zero():
    return zj.Zero(zj.make_mesh(topology="h200:1x2"), min_shard=1)


def _plan(zero, fn=lambda state, batch: state["params"]["w"] * batch.sum(), cache=False, **options):
    sharding = NamedSharding(zero.mesh, P("data"))
    state = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}}
    return zero.plan(jax.jit(fn), state, jax.ShapeDtypeStruct((8,), jnp.float32),
                     compiler_options=options, cache=cache)


def test_it_compiles_without_a_variable_in_this_process(zero, monkeypatch):
    monkeypatch.delenv(topology.NO_GPU_VARIABLE, raising=False)
    plan = _plan(zero)
    assert "all-reduce" in plan.hlo
    assert topology.NO_GPU_VARIABLE not in __import__("os").environ


def _gelu_step(state, batch):
    w = state["params"]["w"]
    return w - jax.grad(lambda w: jax.nn.gelu(w * batch.sum()).mean())(w)


def test_the_fusion_autotuner_would_change_no_instruction(zero):
    """It adds a choice of emitter to the fusions, which needs measurements on a GPU."""
    without, with_it = (_plan(zero, _gelu_step, **options) for options in
                        ({}, {"xla_gpu_experimental_enable_fusion_autotuner": True}))
    texts = [re.sub(r", (metadata|backend_config)=.*|fingerprint\w+=\S+", "", plan.hlo)
             for plan in (without, with_it)]
    assert "fusion(" in texts[0] and "all-" in texts[0] and texts[0] == texts[1]
    assert without.memory == with_it.memory


def test_the_autotuner_is_off_unless_it_is_asked_for(zero, monkeypatch):
    requests = []

    def run(work, request, topology):
        requests.append(request["options"]["xla_gpu_experimental_enable_fusion_autotuner"])
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "_run", run)
    for options in ({}, {"xla_gpu_experimental_enable_fusion_autotuner": True}):
        with pytest.raises(KeyboardInterrupt):
            _plan(zero, **options)
    assert requests == [False, True]


def test_a_product_for_which_triton_has_no_tiles_is_compiled_without_it(zero):
    """The end of attention over 65 tokens, 8 sequences per device; jax 0.12 finds tiles for it."""

    def attend(state, x):
        weights = jax.nn.softmax(jnp.einsum("btnd,bsnd->bnts", x, x))
        mixed = jnp.einsum("bnts,bsnd->btnd", weights, x).reshape(*x.shape[:2], -1)
        return mixed @ state["params"]["w"]

    state = {"params": {"w": jax.ShapeDtypeStruct((96, 96), jnp.float32,
                                                  sharding=NamedSharding(zero.mesh, P()))}}
    x = jax.ShapeDtypeStruct((16, 65, 4, 24), jnp.float32)
    plan = zero.plan(jax.jit(attend), state, x, cache=False)
    assert "f32[520,96]" in plan.hlo
    option, fails = "xla_gpu_enable_triton_gemm", False
    try:
        zero.plan(jax.jit(attend), state, x, cache=False, compiler_options={option: True})
    except zj.CompileError:
        fails = True
    assert (f"{option}=False" in str(plan)) is fails


def test_an_option_that_is_none_names_it_and_the_exit_status(zero):
    text = r"1x2 ended with exit status 1(.|\n)*xla_no_such': 3(.|\n)*No such compile opt"
    with pytest.raises(zj.CompileError, match=text):
        _plan(zero, xla_no_such=3)


def test_a_compiler_that_ends_the_process_ends_its_own(zero, monkeypatch):
    jnp.ones(1).block_until_ready()  # this process has read its flags by now
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    text = r"exit status 1(.|\n)*Unknown flag in XLA_FLAGS: --xla_no_such_flag"
    with pytest.raises(zj.CompileError, match=text):
        _plan(zero)


def _as_compiler(monkeypatch, tmp_path, script):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_out_of_memory_is_said_to_be_that(zero, monkeypatch, tmp_path):
    _as_compiler(monkeypatch, tmp_path, "echo assigning buffers; kill -9 $$")
    text = r"signal SIGKILL. It probably ran out of memory(.|\n)*assigning buffers"
    with pytest.raises(zj.CompileError, match=text):
        _plan(zero)
    _as_compiler(monkeypatch, tmp_path, "echo 'terminate called: std::bad_alloc'; kill -ABRT $$")
    with pytest.raises(zj.CompileError, match=r"signal SIGABRT. It probably ran out of memory"):
        _plan(zero)


def test_an_interrupted_plan_leaves_no_process(zero, monkeypatch, tmp_path):
    new, written = tmp_path / "new", tmp_path / "pid"  # the move writes name and content at once
    _as_compiler(monkeypatch, tmp_path, f"echo $$ > {new}; mv {new} {written}; exec sleep 60")

    def interrupt(child, title):
        while not written.exists():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _plan(zero)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:100],
    lambda whole: whole[:100] + bytes(b ^ 255 for b in whole[100:200]) + whole[200:]])
def test_a_torn_cache_entry_is_made_anew(zero, monkeypatch, tmp_path, damage):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    first = _plan(zero, cache=True)
    entry, = (tmp_path / "programs").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    again = _plan(zero, cache=True)
    assert not again.cached and again.hlo == first.hlo
    assert _plan(zero, cache=True).cached


def test_a_cache_that_cannot_be_written_is_no_error(zero, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    assert not _plan(zero, cache=True).cached


def test_without_the_extra_the_error_names_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(topology, "version", missing)
    with pytest.raises(zj.MissingExtraError, match=r"pip install 'zerojax\[plan\]'"):
        zj.make_mesh(topology="h200:1x8")


def test_a_plugin_of_another_jax_is_named_with_both_versions(monkeypatch):
    monkeypatch.setattr(topology, "version",
                        lambda name: "0.9.1" if "plugin" in name else jax.__version__)
    text = rf"jax is {jax.__version__}, but jax-cuda13-plugin is 0.9.1.*=={jax.__version__}"
    with pytest.raises(zj.PolicyError, match=text):
        zj.make_mesh(topology="h200:1x8")


def test_callbacks_can_not_be_planned(zero):
    def noisy(state, batch):
        jax.debug.print("{}", batch.sum())
        return state["params"]["w"] * batch.sum()

    with pytest.raises(zj.ModelError, match="calls back to Python"):
        _plan(zero, noisy)


def test_a_batch_that_does_not_divide(zero):
    step = zero.train_step(lambda params, x: (x @ params["w"]).mean(), optax.sgd(0.1))
    state = zero.abstract(lambda: {"w": jnp.ones(8)}, optax.sgd(0.1))
    with pytest.raises(zj.BatchError, match="7 examples"):
        step.plan(state, jax.ShapeDtypeStruct((7, 8), jnp.float32))


def test_what_is_not_used_keeps_its_place_and_its_key(zero):
    """jax drops unused inputs from a program; their bytes are there all the same."""
    def loss(params, batch):
        return (batch["x"] @ params["w"]).mean()

    step = zero.train_step(loss, optax.sgd(0.1))
    state = zero.abstract(lambda: {"w": jnp.ones((8, 4))}, optax.sgd(0.1))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((16, 4096), jnp.int32)
    without, with_mask = step.plan(state, {"x": x}), step.plan(state, {"x": x, "mask": mask})
    assert with_mask.memory.peak - without.memory.peak == pytest.approx(16 * 4096 * 4 / 2, rel=0.01)
    other = "other arguments and results"
    assert with_mask.memory.kinds[other] == without.memory.kinds[other]


def test_a_numpy_batch_is_counted_as_jax_will_have_it(zero):
    step = zero.train_step(lambda params, i: params["w"][i].mean(), optax.sgd(0.1))
    state = zero.abstract(lambda: {"w": jnp.ones((8, 4))}, optax.sgd(0.1))
    plan = step.plan(state, np.zeros(4096, np.int64))
    assert plan.memory.kinds["batch"] == 4096 * 4 / 2 and min(plan.memory.kinds.values()) >= 0


def test_static_and_python_arguments_stay_what_they_are(zero):
    state = zero.abstract(lambda: {"w": jnp.ones((64, 64))}, optax.sgd(0.1))

    @functools.partial(zero.jit, static_argnames="way", donate=False)
    def step(state, x, lr, way="plain"):
        return state.params["w"] * x.sum() * lr if way == "twice" else None

    plan = step.plan(state, jax.ShapeDtypeStruct((8,), jnp.bfloat16), 0.5, way="twice", cache=False)
    assert "64" in plan.hlo and plan.memory.kinds["batch"] == 8 * 2 / 2


def test_a_state_of_another_mesh_is_an_error(zero):
    other = zj.Zero(zj.make_mesh(topology="h200:1x4"), min_shard=1)
    step = zero.train_step(lambda params, x: (x @ params["w"]).mean(), optax.sgd(0.1))
    state = other.abstract(lambda: {"w": jnp.ones((8, 4))}, optax.sgd(0.1))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    with pytest.raises(zj.PolicyError, match=r"h200:1x4.*h200:1x2"):
        step.plan(state, x)
    with pytest.raises(zj.BatchError, match="holds no array"):
        step.plan(state, None)


def test_nothing_runs_on_simulated_gpus(zero):
    def loss(params, x):
        return (x @ params["w"]).mean()

    state = zero.abstract(lambda: {"w": jnp.ones((8, 4))}, optax.sgd(0.1))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    for fn in (zero.train_step(loss, optax.sgd(0.1)), zero.eval_step(loss), zero.jit(loss)):
        with pytest.raises(zj.PolicyError, match="over simulated GPUs: nothing can run on them"):
            fn(state, x)
    with pytest.raises(zj.PolicyError, match="feed over simulated GPUs"):
        zj.feed([x], zero)


def test_a_state_that_lies_whole_is_not_zeros(zero):
    """Data parallelism by hand, under a policy of stage 3: right, and no ZeRO."""
    whole = NamedSharding(zero.mesh, P())
    state = {"params": {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=whole)}}

    def step(state, x):
        grads = jax.grad(lambda p: (x @ p["w"]).mean())(state["params"])
        return {"params": jax.tree.map(lambda p, g: p - g, state["params"], grads)}

    jitted = jax.jit(step, donate_argnums=0, out_shardings=whole)
    plan = zero.plan(jitted, state, jax.ShapeDtypeStruct((64, 512), jnp.float32))
    text = r"1 leaf is whole on every device.*against the policy"
    with pytest.raises(zj.PlanError, match=text):
        plan.check()
    assert plan.check(allow="against the policy") is plan


def test_what_is_no_jitted_function_or_has_no_params(zero):
    with pytest.raises(zj.ModelError, match="jitted function"):
        zero.plan(lambda state: state, {"params": {"w": jnp.ones(8)}})
    with pytest.raises(zj.ModelError, match="without params"):
        zero.plan(jax.jit(lambda state: state), {"weights": jnp.ones(8)})


def test_a_topology_of_ones_own_survives_the_mesh(monkeypatch):
    import dataclasses

    ours = zj.Topology(dataclasses.replace(gpus.GPUS["h200"], network=10e9), 2, 4)
    assert zj.Topology.of(zj.make_mesh(topology=ours)) == ours
    with pytest.raises(zj.PolicyError, match="per_host=0"):
        zj.Topology(gpus.GPUS["h200"], 1, 0)


def test_real_cpus_are_planned_but_not_judged():
    """Memory is the CPU compiler's; its collectives are not ZeRO's to judge."""
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
    step = zero.train_step(lambda params, x: (x @ params["w"]).mean(), optax.sgd(0.1))
    state = zero.abstract(lambda: {"w": jnp.ones((8, 64))}, optax.sgd(0.1))
    plan = step.plan(state, jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert plan.memory.kinds["parameters"] == 8 * 64 * 4 / 2
    assert plan.compute is None and plan.fits is None and "peak" in str(plan)
    with pytest.raises(zj.PlanError, match="compiled for CPUs"):
        plan.check()


def test_xlas_reason_is_shown_though_a_stack_trace_follows():
    log = "I000 starting\nE000 INTERNAL: Couldn't find tile sizes\n" + "\n".join(
        f"  frame {i}" for i in range(20))
    text = compiler._why(1, log, {"topology": "h100:1x8", "options": {}})
    assert "INTERNAL: Couldn't find tile sizes\n  " in text and "frame 19" in text
    assert "starting" not in text and "frame 3" not in text
