"""What each of two processes is handed out where their sources are alike, and where they are not.

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


CASES = {
    "alike": ([rows(8), rows(8, 8)], [rows(8, 16), rows(8, 24)], {}),
    "shorter on one": ([rows(8)] * 4, [rows(8)] * 2, {}),
    "uneven": ([rows(8), rows(8)], [rows(8), rows(4)], {}),
    "does not divide": ([rows(8), rows(8)], [rows(8), rows(6)], {}),
    "other shape": ([rows(8)], [rows(8, shape=(3,))], {}),
    "other tree": ([rows(8)], [{"x": rows(8)}], {}),
    "other dtype": ([rows(8)], [rows(8).astype(np.int32)], {}),
    "broken": ([rows(8)] * 3, broken([rows(8)]), {}),
    "nothing": ([], [rows(8)], {}),
    "padded": ([rows(8, 1), rows(3, 1)], [rows(8, 1), rows(8, 1), rows(1, 1)], {"pad": True}),
    "padded, nothing": ([rows(8)], [], {"pad": True}),
    "padded, larger": ([rows(4), rows(8)], [rows(4), rows(8)], {"pad": True}),
    "padded, unlike": ([rows(8)], [rows(4)], {"pad": True}),
}


def shared():
    """A mesh along whose "data" both processes hold the same examples: tensor parallelism between them."""
    devices = np.array(jax.devices()).reshape(2, -1)
    return zj.Zero(jax.sharding.Mesh(devices, ("model", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2))


def run(zero, batches, options):
    """(what the batches, as all processes have them, sum up to; the weights; the error)."""
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(zero.mesh, jax.P()))
    sums, weights = [], []
    try:
        for batch in zj.feed(batches, zero, **options):
            x, weight = batch if options.get("pad") else (batch, None)
            sums.append(float(total(x if weight is None else x[..., 0] * weight)))
            weights += [] if weight is None else [float(total(weight))]
    except (zj.ZeroError, OSError) as error:
        return sums, weights, f"{type(error).__name__}: {error}"
    return sums, weights, ""


def main():
    zj.initialize()
    zero = zj.Zero(zj.make_mesh())
    for name, (first, second, options) in CASES.items():
        for prefetch in (0, 2):
            own = [first, second][jax.process_index()]
            if name == "broken":
                own = iter([rows(8)] * 3) if jax.process_index() == 0 else broken([rows(8)])
            print(json.dumps([f"{name}/{prefetch}", *run(zero, own, options | {"prefetch": prefetch})]), flush=True)
    assert zero.share() == (jax.process_index(), 2) and shared().share() == (0, 1)
    for name, own in (("shared", rows(4)), ("shared, unlike", rows(4, jax.process_index()))):
        print(json.dumps([name, *run(shared(), [own] * 3, {})]), flush=True)
    step = zero.train_step(lambda p, x: (x @ p["w"]).mean(), optax.sgd(0.1))
    state = zero.init(lambda: {"w": jax.numpy.ones((2, 2))}, optax.sgd(0.1))
    for name, take in (("own array", step), ("of a loop", zero.jit(lambda state, x: x))):
        try:
            take(state, rows(16))
        except zj.BatchError as error:
            print(json.dumps([name, [], [], str(error)]), flush=True)


if __name__ == "__main__":
    main()
