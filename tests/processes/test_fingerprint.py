"""Fingerprints of programs, functions and values: equal for the same program, else different."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.custom_partitioning import custom_partitioning

from zerojax.processes import fingerprint

X = np.ones((4, 4), np.float32)


def of_program(fn, *args):
    return fingerprint.of_program(jax.jit(fn), *args)


def both(x):
    return x + 1, x * 2


def sharded(axis):
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P(axis))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def looped(factor):
    return lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * factor, x)


def scanned(length):
    return lambda x: jax.lax.scan(lambda y, _: (y * 2, None), x, length=length)[0]


PROGRAMS = {
    "a constant": (lambda x: x * 2.0, lambda x: x * 3.0),
    "an operation": (lambda x: x + x, lambda x: x * x),
    "a setting": (lambda x: x.sum(0), lambda x: x.sum(1)),
    "an operand": (lambda x: (x + 1) - x, lambda x: x - (x + 1)),
    "an array": (lambda x: x + jnp.arange(4.0)[None],
                 lambda x: x + jnp.array([0.0, 1.0, 2.0, 4.0])[None]),
    "a dtype": (lambda x: x.astype("bfloat16"), lambda x: x.astype("float16")),
    "the order of results": (lambda x: both(x), lambda x: both(x)[::-1]),
    "a constant of an inner program": (lambda x: x + jax.jit(lambda: jnp.asarray(X))(),
                                       lambda x: x + jax.jit(lambda: jnp.asarray(2 * X))()),
    "a sharding": (sharded("a"), sharded(None)),
    "the body of a loop": (looped(2.0), looped(4.0)),
    "the length of a scan": (scanned(3), scanned(4)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_differ(name):
    a, b = PROGRAMS[name]
    assert of_program(a, X) != of_program(b, X)
    assert of_program(a, X) == of_program(lambda x: a(x), X)


def doubled_in_parts(mesh):
    """Returns a function with a `custom_partitioning` call, as in cuDNN's attention."""
    @custom_partitioning
    def doubled(x):
        return x * 2

    def partition(mesh, args, result):
        return mesh, lambda x: x * 2, result.sharding, (args[0].sharding,)

    doubled.def_partition(partition=partition, sharding_rule="i j -> i j",
                          infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding)
    sharding = jax.NamedSharding(mesh, jax.P("a"))
    return lambda x: doubled(jax.lax.with_sharding_constraint(x, sharding))


def test_addresses_are_not_part_of_a_program():
    """The text of a call with custom partitioning has one, which every process chooses anew."""
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    first, second = doubled_in_parts(mesh), doubled_in_parts(mesh)
    texts = [jax.jit(fn).lower(X).as_text() for fn in (first, second)]
    assert all("@CustomSPMDPartitioning" in text for text in texts) and texts[0] != texts[1]
    assert of_program(first, X) == of_program(second, X)


def test_functions_by_their_code():
    def make(scale):
        return lambda x: x * scale

    of = fingerprint.of_function
    assert of(make(1)) == of(make(2)), "the values that they close over show in the program"
    first, second = (eval(f"lambda x: x * {n}") for n in (1, 2))
    assert of(first) != of(second)
    assert of(functools.partial(first)) == of(first)
    nested = [eval(f"lambda x: [y * {n} for y in (lambda: x)()]") for n in (1, 2)]
    assert of(nested[0]) != of(nested[1])


def test_functions_of_objects():
    class Loss:
        def __call__(self, x):
            return x

        def method(self, x):
            return x

    of = fingerprint.of_function
    assert of(Loss()) == of(Loss())
    assert "Loss.__call__" in of(Loss()) and "Loss.method" in of(Loss().method)


def test_values_of_arrays_and_keys():
    def value(x):
        return fingerprint.values({"x": x})["x"]

    assert value(jax.random.key(0)) != value(jax.random.key(1))
    assert value(X) != value(X * 2)
    large = np.zeros(2**17, np.float32)  # a sample of it is hashed
    assert value(large) != value(large + 1) and value(large) == value(large.copy())
    expected = {"x": "float32[4, 4]"}
    assert fingerprint.shapes({"x": X}) == fingerprint.shapes({"x": X * 2}) == expected


CODE = """
import jax; jax.config.update("jax_num_cpu_devices", 8)
import zoo, optax, zerojax as zj
from zerojax.processes import fingerprint
tx = optax.adam(0.1)
for name in ("scanned_remat", "nnx", "mlp", "resnet"):
    model, zero = zoo.MODELS[name](), zj.Zero(zj.make_mesh(), min_shard=1)
    state, step = zero.abstract(model.init, tx), zero.train_step(model.loss, tx, accumulate=2)
    program = fingerprint.of_program(step._jitted, state, model.batch(16, 0))
    print(name, program, fingerprint.of_function(model.loss))
"""


@pytest.mark.slow
def test_another_process_has_the_same_fingerprints(tmp_path):
    """It runs in another directory, with other addresses and another order of sets."""
    tests = str(pathlib.Path(__file__).parent.parent)
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    outputs = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environ = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True,
                              timeout=200, cwd=tmp_path / seed, env=environ)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 4
