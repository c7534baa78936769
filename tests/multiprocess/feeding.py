"""The batches that two processes get from sources that are alike, and from sources that differ.

Prints a line of JSON for each case: [case, sums of the batches, weights, error].
"""

import json

import jax
import numpy as np
import optax

import zerojax as zj


def rows(n, start=0, shape=(2,)):
    return np.arange(start, start + n, dtype=np.float32)[:, None] * np.ones(shape, np.float32)


def broken(batches):
    yield from batches
    raise OSError("disk gone")


CASES = {  # the source of the first process, that of the second, options of feed
    "alike": ([rows(8), rows(8, 8)], [rows(8, 16), rows(8, 24)], {}),
    "shorter on one": ([rows(8)] * 4, [rows(8)] * 2, {}),
    "uneven": ([rows(8), rows(8)], [rows(8), rows(4)], {}),
    "does not divide": ([rows(8), rows(8)], [rows(8), rows(6)], {}),
    "other shape": ([rows(8)], [rows(8, shape=(3,))], {}),
    "other tree": ([rows(8)], [{"x": rows(8)}], {}),
    "other dtype": ([rows(8)], [rows(8).astype(np.int32)], {}),
    "nothing": ([], [rows(8)], {}),
    "padded": ([rows(8, 1), rows(3, 1)], [rows(8, 1), rows(8, 1), rows(1, 1)], {"pad": True}),
    "padded, nothing": ([rows(8)], [], {"pad": True}),
    "padded, larger": ([rows(4), rows(8)], [rows(4), rows(8)], {"pad": True}),
    "padded, unlike": ([rows(8)], [rows(4)], {"pad": True}),
}


def run(zero, batches, options):
    """Returns (the sum of each batch of all processes, their weights, the error)."""
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(zero.mesh, jax.P()))
    sums, weights = [], []
    try:
        for batch in zj.feed(batches, zero, **options):
            if options.get("pad"):
                x, weight = batch
                sums.append(float(total(x[..., 0] * weight)))
                weights.append(float(total(weight)))
            else:
                sums.append(float(total(batch)))
    except (zj.ZeroError, OSError) as error:
        return sums, weights, f"{type(error).__name__}: {error}"
    return sums, weights, ""


def report(name, *found):
    print(json.dumps([name, *found]), flush=True)


def of_sources(zero):
    process = jax.process_index()
    for prefetch in (0, 2):
        for name, (first, second, options) in CASES.items():
            own = [first, second][process]
            report(f"{name}/{prefetch}", *run(zero, own, options | {"prefetch": prefetch}))
        own = broken([rows(8)]) if process else [rows(8)] * 3
        report(f"broken/{prefetch}", *run(zero, own, {"prefetch": prefetch}))


def of_shared_examples():
    """Runs over a mesh whose "data" axis is within each process, and "model" between them."""
    devices = np.array(jax.devices()).reshape(2, -1)
    types = (jax.sharding.AxisType.Auto,) * 2
    zero = zj.Zero(jax.sharding.Mesh(devices, ("model", "data"), axis_types=types))
    assert zero.share() == (0, 1)
    for name, own in (("shared", rows(4)), ("shared, unlike", rows(4, jax.process_index()))):
        report(name, *run(zero, [own] * 3, {}))


def of_own_arrays(zero):
    """Passes an array of one process to a step and to a loop."""
    step = zero.train_step(lambda p, x: (x @ p["w"]).mean(), optax.sgd(0.1))
    state = zero.init(lambda: {"w": jax.numpy.ones((2, 2))}, optax.sgd(0.1))
    for name, take in (("own array", step), ("of a loop", zero.jit(lambda state, x: x))):
        try:
            take(state, rows(16))
        except zj.BatchError as error:
            report(name, [], [], str(error))


def main():
    zj.initialize()
    zero = zj.Zero(zj.make_mesh())
    assert zero.share() == (jax.process_index(), 2)
    of_sources(zero)
    of_shared_examples()
    of_own_arrays(zero)


if __name__ == "__main__":
    main()
