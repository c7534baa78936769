"""What a process says of the program that it is about to run: as every other that runs the same, and unlike any that does not."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.processes import fingerprint


def of_program(fn, *args):
    return fingerprint.of_program(jax.jit(fn), *args)


X = np.ones((4, 4), np.float32)


def _both(x):
    return x + 1, x * 2


def _lies(axis):
    return jax.NamedSharding(jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]), jax.P(axis))


PROGRAMS = {
    "a constant": (lambda x: x * 2.0, lambda x: x * 3.0),
    "an operation": (lambda x: x + x, lambda x: x * x),
    "a setting": (lambda x: x.sum(0), lambda x: x.sum(1)),
    "an operand": (lambda x: (x + 1) - x, lambda x: x - (x + 1)),
    "an array": (lambda x: x + jnp.arange(4.0)[None], lambda x: x + jnp.array([0.0, 1.0, 2.0, 4.0])[None]),
    "a dtype": (lambda x: x.astype("bfloat16"), lambda x: x.astype("float16")),
    "what is returned": (lambda x: _both(x), lambda x: _both(x)[::-1]),
    "a constant within": (lambda x: x + jax.jit(lambda: jnp.asarray(X))(), lambda x: x + jax.jit(lambda: jnp.asarray(2 * X))()),
    "a sharding": (lambda x: jax.lax.with_sharding_constraint(x, _lies("a")),
                   lambda x: jax.lax.with_sharding_constraint(x, _lies(None))),
    "within a loop": (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2.0, x),
                      lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 4.0, x)),
    "how often": (lambda x: jax.lax.scan(lambda y, _: (y * 2, None), x, length=3)[0],
                  lambda x: jax.lax.scan(lambda y, _: (y * 2, None), x, length=4)[0]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_differ(name):
    a, b = PROGRAMS[name]
    assert of_program(a, X) != of_program(b, X)
    assert of_program(a, X) == of_program(lambda x: a(x), X)


def test_functions_by_their_code():
    of = fingerprint.of_function
    make = lambda scale: lambda x: x * scale
    assert of(make(1)) == of(make(2)), "what they close over shows in the program"
    first, second = (eval(f"lambda x: x * {n}") for n in (1, 2))
    assert of(first) != of(second)
    assert of(functools.partial(first)) == of(first)
    nested = [eval(f"lambda x: [y * {n} for y in (lambda: x)()]") for n in (1, 2)]
    assert of(nested[0]) != of(nested[1])

    class Loss:
        def __call__(self, x):
            return x

        def method(self, x):
            return x

    assert of(Loss()) == of(Loss()) and "Loss.__call__" in of(Loss()) and "Loss.method" in of(Loss().method)


def test_values_of_arrays_and_keys():
    values = lambda x: fingerprint.values({"x": x})["x"]
    assert values(jax.random.key(0)) != values(jax.random.key(1)) and values(X) != values(X * 2)
    large = np.zeros(2**17, np.float32)  # of which a part is looked at
    assert values(large) != values(large + 1) and values(large) == values(large.copy())
    assert fingerprint.shapes({"x": X}) == fingerprint.shapes({"x": X * 2}) == {"x": "float32[4, 4]"}


CODE = """
import jax; jax.config.update("jax_num_cpu_devices", 8)
import zoo, optax, zerojax as zj
from zerojax.processes import fingerprint
for name in ("scanned_remat", "nnx", "mlp", "resnet"):
    model, zero = zoo.MODELS[name](), zj.Zero(zj.make_mesh(), min_shard=1)
    state, step = zero.abstract(model.init, optax.adam(0.1)), zero.train_step(model.loss, optax.adam(0.1), accumulate=2)
    print(name, fingerprint.of_program(step._jitted, state, model.batch(16, 0)), fingerprint.of_function(model.loss))
"""


def test_another_process_says_the_same(tmp_path):
    """With other addresses and another order of sets, from another directory."""
    path = os.pathsep.join([str(pathlib.Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    said = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=200, cwd=tmp_path / seed,
                              env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 4
