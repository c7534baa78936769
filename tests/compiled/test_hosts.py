"""Bytes within hosts and between them: the second copy, and formats on the wire."""

import functools

import jax
import models
import optax
import pytest
import quick

import zerojax as zj

WIDTH, LAYERS, VOCAB, SEQ = 512, 4, 8192, 512
HOSTS, PER_HOST = 2, 4
MIB = 2**20
CASE = models.language(models.Transformer(width=WIDTH, layers=LAYERS, vocab=VOCAB))
TX = optax.adam(1e-4)
INT8 = zj.Wire("int8", "int8", block=128)
NAMES = ["flat", "second", "one loss", "int8", "int8 in two hops", "second and int8", "bfloat16",
         "float8"]
SETTINGS = {"second": {"hosts": HOSTS, "secondary": "data"},
            "one loss": {"hosts": HOSTS, "secondary": "data", "gradients": "global"},
            "int8": {"wire": INT8},
            "int8 in two hops": {"hosts": HOSTS, "wire": INT8},
            "second and int8": {"hosts": HOSTS, "secondary": "data", "wire": INT8},
            "bfloat16": {"wire": zj.Wire(reduce="bfloat16"), "reduce": "float32"},
            "float8": {"wire": zj.Wire(gather="float8_e4m3fn")}}
BLOCKS = LAYERS * WIDTH * WIDTH * 12  # parameters in the layers' kernels
TABLES = 2 * VOCAB * WIDTH  # embedding and head
SCALES = 4 / 128  # bytes per element


@functools.cache
def plan(name):
    settings = dict(SETTINGS.get(name, {}))
    mesh = zj.make_mesh(topology=f"h200:{HOSTS}x{PER_HOST}", hosts=settings.pop("hosts", 1))
    precision = zj.Precision(compute="bfloat16", reduce=settings.pop("reduce", "bfloat16"))
    zero = zj.Zero(mesh, 3, precision=precision, **settings)
    state = zero.abstract(CASE.init, TX, *CASE.example)
    batch = jax.ShapeDtypeStruct((HOSTS * PER_HOST, SEQ), "int32")
    return zero.train_step(CASE.loss, TX).plan(state, batch, cache=False)


some = pytest.mark.parametrize(
    "name", quick.some(NAMES, {"second and int8"}.__contains__))


def sent(name, kind, axes, dtype=None, backward=None):
    """Returns the MiB that each device sends."""
    return sum(t.bytes for t in plan(name).communication
               if t.kind == kind and t.axes == axes and dtype in (None, t.dtype)
               and backward in (None, t.backward) and t.bytes > 2**16) / MIB


def shared(elements, devices, itemsize):
    """Returns the MiB that each of the devices sends to gather or reduce so many elements."""
    return elements * itemsize * (devices - 1) / devices / MIB


@some
def test_zero_explains_everything(name):
    made = plan(name).check()
    assert made.sent == pytest.approx(made.zero_bytes - MIB * _kept(name), rel=0.02)


def _kept(name):
    """Returns the MiB of the second gathers of the embedding and the head, which are kept."""
    if name == "int8 in two hops":
        return shared(TABLES, PER_HOST, 2) + shared(TABLES / PER_HOST, HOSTS, 2)
    if "second" in name or name == "one loss":
        return shared(TABLES, PER_HOST, 2)
    return shared(TABLES, HOSTS * PER_HOST, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["second", "one loss"])
def test_the_backward_pass_gathers_within_hosts(name):
    assert sent(name, "all-gather", ("host",), backward=True) == 0
    forward = shared((BLOCKS + TABLES) / PER_HOST, HOSTS, 2)
    assert sent(name, "all-gather", ("host",)) == pytest.approx(forward, rel=0.02)
    within = shared(2 * BLOCKS + TABLES, PER_HOST, 2)
    assert sent(name, "all-gather", ("data",)) == pytest.approx(within, rel=0.02)


@pytest.mark.slow
def test_only_shards_of_gradients_cross_hosts():
    within = shared(BLOCKS + TABLES, PER_HOST, 2)
    between = shared((BLOCKS + TABLES) / PER_HOST, HOSTS, 2)
    assert sent("second", "reduce-scatter", ("data",)) == pytest.approx(within, rel=0.02)
    assert sent("second", "reduce-scatter", ("host",)) == pytest.approx(between, rel=0.02)


@pytest.mark.slow
def test_the_second_copy_halves_the_gathers_between_hosts_and_takes_its_memory():
    flat, second = plan("flat"), plan("second")
    once = shared((BLOCKS + TABLES) / PER_HOST, HOSTS, 2) * MIB
    ring = (2 * BLOCKS + TABLES) * 2 * 7 / 8 / PER_HOST
    reduced = (BLOCKS + TABLES) * 2 * 7 / 8 / PER_HOST
    assert flat.between == pytest.approx(ring + reduced, rel=0.02)
    assert second.between == pytest.approx(2 * once, rel=0.02)
    copy = (BLOCKS + TABLES) * 2 / PER_HOST
    # measured: 1.15 of the copy with jax 0.10, and 0.40 with jax 0.12
    assert 0.3 * copy < second.memory.peak - flat.memory.peak < 1.3 * copy


def test_codes_and_scales_travel_in_two_hops():
    name, codes = "second and int8", BLOCKS * (1 + SCALES)
    for kind, hops in (("all-gather", 2), ("all-to-all", 1)):
        found = sent(name, kind, ("data",), "s8") + sent(name, kind, ("data",), "f32")
        assert found == pytest.approx(hops * shared(codes, PER_HOST, 1), rel=0.02)
        found = sent(name, kind, ("host",), "s8") + sent(name, kind, ("host",), "f32")
        assert found == pytest.approx(shared(codes / PER_HOST, HOSTS, 1), rel=0.04)
    assert sent(name, "all-gather", ("data",), "bf16") == pytest.approx(
        shared(TABLES, PER_HOST, 2), rel=0.02)


@pytest.mark.slow
def test_codes_and_scales_take_half_the_bytes():
    codes = BLOCKS * (1 + SCALES)
    for kind, times in (("all-gather", 2), ("all-to-all", 1)):
        found = sent("int8", kind, ("data",), "s8") + sent("int8", kind, ("data",), "f32")
        assert found == pytest.approx(times * shared(codes, 8, 1), rel=0.02)
    found = sent("float8", "all-gather", ("data",), "f8e4m3fn")
    assert found == pytest.approx(2 * shared(BLOCKS, 8, 1), rel=0.02)


@pytest.mark.slow
def test_in_two_hops_only_sums_of_codes_cross_hosts():
    assert plan("int8 in two hops").between < 0.6 * plan("int8").between
    notes = {name: [f.what for f in plan(name).findings if "On zj.make_mesh(hosts=2)" in f.what]
             for name in ("int8", "int8 in two hops")}
    assert len(notes["int8"]) == 1 and not notes["int8 in two hops"]
    codes = BLOCKS * (1 + SCALES)
    name = "int8 in two hops"
    found = sent(name, "all-gather", ("host",), "s8") + sent(name, "all-gather", ("host",), "f32")
    assert found == pytest.approx(2 * shared(codes / PER_HOST, HOSTS, 1), rel=0.04)


@pytest.mark.slow
def test_random_rounding_takes_half_the_bytes_of_a_float32_reduction():
    found = sent("bfloat16", "all-to-all", ("data",), "bf16")
    assert found == pytest.approx(shared(BLOCKS + TABLES, 8, 2), rel=0.02)
    assert sent("bfloat16", "reduce-scatter", ("data",)) == 0


def test_a_plan_shows_what_leaves_the_host():
    made = plan("second and int8")
    text = str(made)
    assert "off host" in text
    rows = [t for t in made.communication if t.axes == ("data",)]
    assert rows and all(t.between == 0 for t in rows)
    assert made.between == sum(t.bytes for t in made.communication if t.axes == ("host",)) + sum(
        t.between for t in made.communication if t.axes not in (("host",), ("data",)))
