"""Islands of any model: random keys, batch statistics, convolutions, frozen and padded parameters.

And any number of islands, batches from `feed`, and the mistakes that are refused.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zerojax as zj

TX = optax.adam(0.05)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 8)).astype(np.float32)
IMAGES = RNG.normal(size=(8, 8, 8, 3)).astype(np.float32)


def zero(islands=2, n=8, **settings):
    mesh = zj.make_mesh(islands=islands, devices=jax.devices()[:n])
    return zj.Zero(mesh, **{"min_shard": 1, **settings})


def weights():
    return {"w": jax.random.normal(jax.random.key(1), (8, 16))}


def loss(params, x):
    return zj.Loss(((x @ params["w"] - 1) ** 2).sum(), x.shape[0])


def alone(init, loss_fn, batches, tx=TX, index=0, **options):
    """Returns the state of a run of one island on one device, which draws like island `index`."""
    own = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]), 0, gradients="global")
    state = own.init(init, tx, rng=jax.random.fold_in(jax.random.key(0), index), **options)
    step = own.train_step(loss_fn, tx)
    for batch in batches:
        state, _ = step(state, batch)
    return state


def assert_islands_close(state, runs, atol=2e-6):
    """Compares the trees of islands, `[n, ...]`, with those of runs of their own."""
    for i, one in enumerate(runs):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=0, atol=atol),
                     state, one)


@pytest.mark.slow
def test_islands_draw_from_keys_of_their_own():
    def noisy(params, x, rng):
        return loss(params, x + jax.random.normal(rng, x.shape))

    islands, same = zero(gradients="global").islands(2, every=9), np.concatenate([X[:8]] * 2)
    state, step = islands.init(weights, TX), islands.train_step(noisy, TX)
    for _ in range(2):
        state, _ = step(state, same)
    assert np.abs(np.diff(state.islands.params["w"], axis=0)).max() > 0.01
    assert_islands_close(state.islands.params,
                         [alone(weights, noisy, [X[:8]] * 2, index=i).params for i in range(2)])


class Dropped(nnx.Module):
    """[batch, 8] to [batch, 16], with the stream of random numbers in the module."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.layer(x))


@pytest.mark.slow
def test_streams_of_nnx_differ_between_islands_and_survive_a_move():
    islands, same = zero().islands(2, every=9), np.concatenate([X[:8]] * 2)
    tx = optax.sgd(0.1)
    state = islands.init(lambda: Dropped(nnx.Rngs(0)), tx)
    step = islands.train_step(lambda model, x: zj.Loss((model(x) ** 2).sum(), len(x)), tx)
    state, metrics = step(state, same)
    assert metrics["loss"][0] != metrics["loss"][1]
    four = zero(4).islands(4, every=9)
    moved = islands.move(state, four)
    _, metrics = four.train_step(step.loss_fn, tx)(moved, np.concatenate([X[:8]] * 4))
    assert len(set(metrics["loss"].tolist())) == 4


class Normed(nn.Module):
    """Images [batch, 8, 8, 3] to [batch, 8], by convolutions, one of them by channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Conv(8, (3, 3), 2)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8)(nn.tanh(x))
        return nn.Dense(8)(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("groups, devices", [(8, 8), (4, 8), (1, 1)])
def test_batch_statistics_and_convolutions(groups, devices):
    """XLA partitions convolutions wrongly if the islands are a mapped dimension."""
    model, n = Normed(), max(groups, 2)

    def judge(variables, x):
        y, state = model.apply(variables, x, mutable=["batch_stats"])
        return zj.Loss(((y - 1) ** 2).sum(), y.size, model_state=state)

    def init():
        return model.init(jax.random.key(0), IMAGES[:1])

    islands, tx = zero(groups, devices).islands(n, every=3), optax.sgd(0.1)
    state, step = islands.init(init, tx), islands.train_step(judge, tx)
    runs = [alone(init, judge, [part] * 2, tx) for part in np.split(IMAGES, n)]
    for _ in range(2):
        state, _ = step(state, IMAGES)
    assert_islands_close((state.islands.params, state.islands.model_state),
                         [(own.params, own.model_state) for own in runs], atol=1e-4)
    statistics = islands.average(state).model_state["batch_stats"]["BatchNorm_0"]["var"]
    theirs = [own.model_state["batch_stats"]["BatchNorm_0"]["var"] for own in runs]
    np.testing.assert_allclose(statistics, np.mean(theirs, 0), rtol=1e-4)
    state, _ = step(state, IMAGES)  # ends the round
    for x in jax.tree.leaves((state.islands.params, state.islands.model_state)):
        assert np.abs(x - x[:1]).max() == 0


def test_frozen_parameters_are_there_once_for_all_islands():
    def init():
        return {**weights(), "table": jnp.ones((8, 8), jnp.bfloat16)}

    def judge(params, x):
        return loss(params, x @ params["table"].astype(x.dtype))

    islands = zero().islands(2, every=2, outer=optax.sgd(0.7))
    state = islands.init(init, TX, trainable="w")
    step = islands.train_step(judge, TX)
    for _ in range(2):
        state, _ = step(state, X)
    table = state.islands.params["table"]
    assert table.shape == (8, 8) and table.sharding.spec == jax.P(None, "data")
    assert state.outer.params["table"] is None and (table == 1).all()
    assert islands.average(state).params["table"].shape == (8, 8)
    rows = {row.path: row for row in islands.layout(state).rows}
    assert rows["islands/params/table"].bytes == 8 * 8 * 2 / 4
    assert rows["islands/params/w"].bytes == 8 * 16 * 4 / 4
    assert rows["outer/params/w"].bytes == 8 * 16 * 4 / 4


@pytest.mark.slow
def test_padded_parameters(tmp_path):
    def init():
        return {"w": jax.random.normal(jax.random.key(1), (7, 9))}

    def judge(params, x):
        return loss(params, x[:, :7])

    islands = zero(uneven="pad").islands(2, every=2, outer=optax.sgd(1.0))
    state, step = islands.init(init, TX), islands.train_step(judge, TX)
    w = state.islands.params["w"]
    assert (w.shape, w.kept.shape) == ((2, 7, 9), (2, 7, 12))
    state, _ = step(state, X)
    runs = [alone(init, judge, [part]) for part in np.split(X, 2)]
    assert_islands_close(np.asarray(state.islands.params["w"]),
                         [np.asarray(own.params["w"]) for own in runs])
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        other = zero(n=6, uneven="pad").islands(2, every=2, outer=optax.sgd(1.0))  # no padding
        restored = checkpoints.restore_latest(other.abstract(init, TX)).state
    np.testing.assert_array_equal(np.asarray(restored.islands.params["w"]),
                                  np.asarray(state.islands.params["w"]))
    moved = islands.move(state, other)
    mean = np.mean([np.asarray(own.params["w"]) for own in runs], 0)
    np.testing.assert_allclose(np.asarray(moved.islands.params["w"]), np.stack([mean] * 2),
                               atol=2e-6)
    state, _ = step(state, X)  # ends the round
    assert np.abs(np.diff(np.asarray(state.islands.params["w"]), axis=0)).max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"stage": 3, "gradients": "per_device"}, {"stage": 1},
                                      {"stage": 2, "gradients": "global"}])
def test_16_bits(settings):
    """XLA's CPU compiler aborts on 16-bit sums whose reduction jax constrains (in a shard_map)."""
    def judge(params, x):
        return loss(params, x.astype(params["w"].dtype) / 8)

    islands = zero(precision=zj.Precision(compute="bfloat16"), **settings).islands(2, every=5)
    state, step = islands.init(weights, TX), islands.train_step(judge, TX)
    for _ in range(2):
        state, metrics = step(state, X)
    runs = [alone(weights, judge, [part] * 2) for part in np.split(X, 2)]
    assert_islands_close(state.islands.params, [own.params for own in runs], atol=0.02)
    assert metrics["skipped"].tolist() == [0, 0]
    moved = np.abs(state.islands.params["w"][0] - weights()["w"]).max()
    assert moved > 0.09


@pytest.mark.slow
@pytest.mark.parametrize("n, groups, devices", [(1, 1, 4), (6, 2, 4), (4, 1, 1)])
def test_any_number_of_islands(n, groups, devices):
    islands, batch = zero(groups, devices).islands(n, every=3), np.concatenate([X] * 3)
    state, step = islands.init(weights, TX), islands.train_step(loss, TX)
    for _ in range(2):
        state, metrics = step(state, batch)
    runs = [alone(weights, loss, [part] * 2) for part in np.split(batch, n)]
    assert_islands_close(state.islands.params, [own.params for own in runs])
    assert metrics["loss"].shape == (n,)
    state, _ = step(state, batch)
    w = state.islands.params["w"]
    assert w.shape == (n, 8, 16) and np.abs(w - w[:1]).max() == 0


@pytest.mark.slow
def test_replicas_within_islands_and_a_mesh_of_the_users():
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("copy", "pod", "shard"), axis_types=types,
                         devices=jax.devices()[:8])
    policy = zj.Zero(mesh, axis="shard", replica_axis="copy", min_shard=1)
    islands = policy.islands(2, every=5, axis="pod")
    state, step = islands.init(weights, TX), islands.train_step(loss, TX)
    for batch in zj.feed([X] * 2, islands):
        assert batch.sharding.spec == jax.P(("pod", "copy", "shard"))
        state, _ = step(state, batch)
    assert state.islands.params["w"].sharding.spec == jax.P("pod", None, "shard")
    assert_islands_close(state.islands.params,
                         [alone(weights, loss, [part] * 2).params for part in np.split(X, 2)])
    assert zj.make_mesh(islands=2, replica=2, devices=jax.devices()[:8]).shape == {
        "island": 2, "replica": 2, "data": 2}


def test_feed_gives_each_island_its_part():
    islands = zero().islands(2, every=2)
    batch, = zj.feed([np.arange(16)], islands)
    assert batch.sharding == islands.batch_sharding() and islands.share() == (0, 1)
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [
        [2 * i, 2 * i + 1] for i in range(8)]
    with pytest.raises(zj.BatchError, match=r"12 examples .* over 8 devices"):
        next(zj.feed([np.zeros((12, 8))], islands))


WRONG = [
    (lambda: zero().islands(3, every=2), "axis 'island' has 2 groups of devices, so the number of "
                                         "islands must be 2 or a multiple"),
    (lambda: zero().islands(0, every=2), r"islands\(0\)"),
    (lambda: zero().islands(True, every=2), r"islands\(True\)"),
    (lambda: zero().islands(2, every=0), r"islands\(every=0\): write the number of steps"),
    (lambda: zero().islands(2, every=2, outer=0.7), r"islands\(outer=a float\): write an optax"),
    (lambda: zero().islands(2, every=2, axis="data"), "this one is one of ZeRO's own"),
    (lambda: zj.Zero(zj.make_mesh()).islands(2, every=2),
     r"has the axes {'data': 10}, and this one is not among them; .*make_mesh\(islands=2\)"),
    (lambda: zj.make_mesh(islands=3, devices=jax.devices()[:8]),
     r"make_mesh\(islands=3\): 8 devices do not divide evenly into 3 islands"),
]


@pytest.mark.parametrize("call, text", WRONG)
def test_wrong_islands_are_refused(call, text):
    with pytest.raises(zj.PolicyError, match=text):
        call()


def test_wrong_states_and_batches_are_refused():
    policy = zero()
    islands, four = policy.islands(2, every=2), zero(4).islands(4, every=2)
    one, state, step = policy.init(weights, TX), islands.init(weights, TX), None
    step = islands.train_step(loss, TX)
    with pytest.raises(zj.ModelError, match=r"was given a \S*TrainState .* islands.start\(state\)"):
        step(one, X)
    with pytest.raises(zj.BatchError, match=r"12 examples, which .* over 2 islands x 4 devices in "
                                            "each x 1 microbatches = 8; give batches of 8"):
        step(state, X[:12])
    with pytest.raises(zj.ModelError, match=r"of 4 islands was given .* shape \(2, .*old.move"):
        four.train_step(loss, TX)(state, X)
    with pytest.raises(zj.ModelError, match=r"not the state that islands.init or the step"):
        islands.average(one)
    with pytest.raises(zj.ModelError, match=r"islands.start was given"):
        islands.start(state)
    with pytest.raises(zj.PolicyError, match=r"islands.move was given a zerojax.zero.Zero"):
        islands.move(state, policy)
    with pytest.raises(zj.PolicyError, match=r"within another function that jax traces"):
        jax.jit(step)(state, X)
    with pytest.raises(zj.ModelError, match=r"given another optimizer than zero.init"):
        islands.train_step(loss, optax.sgd(0.1, momentum=0.9))(state, X)
    jax.jit(lambda x: x, donate_argnums=0)(state)
    with pytest.raises(zj.StateError, match="average was given a state whose memory"):
        islands.average(state)


def test_islands_print():
    islands = zero().islands(2, every=2, outer=optax.sgd(1.0))
    text = "Islands(2, every=2, outer=...) of Zero(mesh of island=2, data=4 (cpu), stage=3, min_s"
    assert repr(islands).startswith(text)
    step = repr(islands.train_step(loss, TX))
    assert step.startswith("IslandsStep(loss") and step.endswith(f"in {islands!r}")
    assert repr(islands.abstract(weights, TX)).startswith("Islands of a TrainState, step ?")


def test_states_of_islands_where_one_state_is_expected(tmp_path):
    islands = zero().islands(2, every=3)
    state, one = islands.init(weights, TX), zero()
    for call, text in [
            (lambda: one.eval_step(loss)(state, X), r"eval_step was given a state of islands"),
            (lambda: one.train_step(loss, TX)(state, X), r"islands.average\(state\)"),
            (lambda: one.train_step(loss, TX)(state.islands, X), r"a state of islands"),
            (lambda: one.move(state, one), r"write islands.move\(state, other_islands\)"),
            (lambda: zj.export_safetensors(state, tmp_path / "m.safetensors"),
             r"islands.average\(state\), path")]:
        with pytest.raises(zj.ZeroError, match=text):
            call()
    assert not any(tmp_path.iterdir())


def test_as_many_islands_on_other_groups_are_refused():
    """XLA would abort the process."""
    few, many = zero(2).islands(4, every=3), zero(4).islands(4, every=3)
    for ours, theirs in ((few, many), (many, few)):
        with pytest.raises(zj.ModelError, match=r"state on \d groups; write state = old.move"):
            ours.train_step(loss, TX)(theirs.init(weights, TX), X)


def test_a_donated_state_is_refused_by_name():
    islands = zero().islands(2, every=3)
    state, step = islands.init(weights, TX), islands.train_step(loss, TX)
    step(state, X)
    with pytest.raises(zj.StateError):
        step(state, X)


def test_formats_that_apply_to_nothing_are_named():
    with pytest.warns(UserWarning, match=r"Wire\(gather='int8'\) applies to none of the 1 param"):
        zero(wire=zj.Wire("int8")).islands(2, every=3).init(weights, TX)


@pytest.mark.slow
def test_islands_of_hosts_with_a_second_copy_and_codes():
    """Each island is a run of its own on its devices, to within the error of the codes."""

    def make():
        return {"w": jax.random.normal(jax.random.key(1), (64, 128))}

    x = RNG.normal(size=(16, 64)).astype(np.float32)
    for wire, atol in ((zj.Wire(), 1e-6), (zj.Wire("int8", "int8", block=64), 2e-2)):
        mesh = zj.make_mesh(islands=2, hosts=2, devices=jax.devices()[:8])
        islands = zj.Zero(mesh, 3, secondary="data", wire=wire, min_shard=1).islands(2, every=9)
        state = islands.init(make, optax.sgd(1e-3))
        step = islands.train_step(loss, optax.sgd(1e-3))
        for _ in range(2):
            state, _ = step(state, x)
        runs = [alone(make, loss, [part] * 2, optax.sgd(1e-3)) for part in (x[:8], x[8:])]
        assert_islands_close(state.islands.params, [run.params for run in runs], atol)
