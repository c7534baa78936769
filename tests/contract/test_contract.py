"""The contract: every stage, model, way, split, precision and mesh trains like one device.

Five steps are compared with `oracle.train`. In fp32, the tolerance is 1e-5 of each parameter's
largest value. In 16 bits, it is relative to the distance that the parameters moved: gradients are
then sums of parts that were rounded separately, while one device rounds elsewhere.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pairs
import pytest
import quick
import zoo

import zerojax as zj

STEPS = 5
F32, BF16, F16 = "float32", "bfloat16", "float16"
SCALE = 2.0**6  # of float16 losses; small enough that nothing overflows
MESHES = {"1": (1, 1), "6": (6, 1), "8": (8, 1), "10": (10, 1), "2x4": (8, 2)}

FACTORS = {
    "model": list(zoo.MODELS),
    "stage": [0, 1, 2, 3],
    "way": ["global", "per_device", None],
    "accumulate": [1, 4],
    "compute": [F32, BF16, F16],
    "reduce": ["as computed", F32],
    "mesh": list(MESHES),
    "tx": ["momentum", "adamw", "adafactor", "chain"],
    "clip": [None, 0.3],
    "trained": ["all", "some"],
    "keep": [False, True],
    "uneven": [None, "pad"],
}
ONE_LOSS = ("resnet", "unrolled", "equinox")  # models with new state, or whose loss is a bare mean


def allowed(row) -> bool:
    compute, way, model = row["compute"], row["way"], row["model"]
    if compute == row["reduce"]:
        return False
    one_loss = way == "global" or (way is None and model in ONE_LOSS)
    if one_loss and (row["reduce"] == F32 or _deadlocks(model, compute)):
        return False
    if way == "per_device" and model == "resnet":
        return False
    if compute != F32 and row["tx"] != "momentum":  # Adam divides rounding errors by one another
        return False
    if row["uneven"] and row["tx"] == "adafactor":  # its result depends on padding
        return False
    # Other models cannot carry float32 through their loops.
    return not row["keep"] or compute == F32 or model in ("mlp", "matrices")


def _deadlocks(model, compute):
    """Whether XLA's CPU devices may join two collectives in different orders (jax 0.10 to 0.12)."""
    return compute == F16 and model == "tied"


CASES = pairs.rows(FACTORS, allowed)
SECONDS = {"mlp": 4, "matrices": 3, "scanned_matrices": 5, "dataclass": 5, "equinox": 6, "rnn": 7,
           "resnet": 7, "tied": 9, "scanned": 9, "unrolled": 10, "nnx": 10, "scanned_remat": 11,
           "unrolled_remat": 11}  # about what a row takes, with jax 0.12 on one core
QUICK = pairs.cheapest(CASES, lambda row: SECONDS[row["model"]], 100)


def zero_for(case) -> zj.Zero:
    n, replica = MESHES[case["mesh"]]
    compute = case["compute"]
    reduce = compute if case["reduce"] == "as computed" else case["reduce"]
    mesh = zj.make_mesh(devices=jax.devices()[:n], replica=replica)
    precision = zj.Precision(compute=compute, reduce=reduce,
                             keep={re.escape(path): dtype for path, dtype in kept(case).items()})
    return zj.Zero(mesh, case["stage"], gradients=case["way"], min_shard=1, uneven=case["uneven"],
                   precision=precision)


def _paths(case):
    params, _ = zoo.MODELS[case["model"]]().born
    return [oracle.path_of(path) for path, _ in jax.tree.leaves_with_path(params)]


def kept(case) -> dict[str, str]:
    """Returns the path of the last parameter, which stays in float32, if the case asks for it."""
    return {_paths(case)[-1]: F32} if case["keep"] else {}


def trained(case):
    """Returns a function that chooses every parameter, or every second one."""
    chosen = _paths(case)[::2 if case["trained"] == "some" else 1]
    return lambda path, x=None: path in chosen


def test_the_quick_rows_cover_most_pairs():
    assert pairs.covered(QUICK, CASES) >= 0.65


@pytest.mark.parametrize("case", quick.some(CASES, QUICK.__contains__),
                         ids=lambda c: "-".join(str(v) for v in c.values()))
def test_equals_one_device(case, lowerings):
    model, tx, zero = zoo.MODELS[case["model"]](), zoo.OPTIMIZERS[case["tx"]](), zero_for(case)
    options = {"accumulate": case["accumulate"], "clip_norm": case["clip"]}
    batches = [model.batch(2 * zero.parts * case["accumulate"], seed) for seed in range(STEPS)]
    params, model_state, losses = oracle.train(
        model, tx, batches, compute=case["compute"], scale=SCALE, trained=trained(case),
        keep=kept(case), **options)
    state = _born(case, model, tx, zero)
    born = zj.logical(jax.tree.map(np.array, state.params))
    shardings = [x.sharding for x in jax.tree.leaves(state)]
    step = zero.train_step(model.loss, tx, compiler_options=oracle.QUICK, **options)
    ours, lowered = [], []
    for batch in zj.feed(batches, zero):
        before = len(lowerings)
        state, metrics = step(state, batch)
        ours.append(metrics["loss"])
        lowered.append(len(lowerings) - before)
    assert lowered == [1] + [0] * (STEPS - 1), "compiles once"
    assert [x.sharding for x in jax.tree.leaves(state)] == shardings
    assert_sharded(zero, state)
    rtol = {F32: 1e-5, BF16: 3e-2, F16: 5e-3}[case["compute"]]
    np.testing.assert_allclose(np.array(ours, float), losses, rtol=rtol)
    oracle.assert_close(zj.logical(state.params), params, born, case["compute"])
    if case["model"] == "resnet":
        assert_same_statistics(case, state.model_state, model_state)


def _born(case, model, tx, zero):
    trainable = trained(case) if case["trained"] == "some" else None
    state = zero.init(model.init, tx, trainable=trainable)
    if case["compute"] != F16:
        return state
    value = jnp.full_like(state.scale.value, SCALE)
    return state.replace(scale=state.scale.replace(value=value))


def assert_same_statistics(case, ours, theirs):
    rtol = 3e-2 if case["compute"] == BF16 else 2e-3
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-3)


def assert_sharded(zero, state):
    """At rest, every leaf with a divisible dimension, or one that may be padded, is sharded."""

    def divides(d):
        return d > 1 if zero.uneven else d % zero.shards == 0

    for x in jax.tree.leaves(state.params):
        able = zero.stage > 0 and zero.shards > 1 and any(map(divides, x.shape))
        stacked = x.ndim and x.shape[0] in (zoo.LAYERS, 3)
        scanned = stacked and not any(map(divides, x.shape[1:]))
        assert x.sharding.is_fully_replicated == (not able) or scanned, x.shape
