"""Targets that a checkpoint does not fit, leaves that do not divide, and parts that are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import states

import zerojax as zj

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fit")
    states.saved(directory, [1])
    with zj.Checkpointer(directory) as opened:
        yield opened


def with_param(target, name, **changes):
    """Returns a target in which one parameter has another dtype or sharding."""
    changed = target.params[name].update(**changes)
    return target.replace(params=target.params | {name: changed})


def test_other_shapes_and_another_tree(checkpoints):
    def other(key):
        made = states.init(key)
        return {"w": jnp.ones((64, 33)), "odd": made["odd"], "more": jnp.ones(2),
                "none": made["none"]}

    with pytest.raises(zj.CheckpointError) as error:
        checkpoints.restore(1, states.zero().abstract(other, states.tx, KEY))
    text = str(error.value)
    assert "does not fit the target: 9 leaves differ" in text
    assert "params/w: float32[64, 32] in the checkpoint, float32[64, 33] in the target" in text
    assert "params/more: not in the checkpoint, float32[2] in the target" in text
    assert "params/half: float32[24] in the checkpoint, not in the target" in text


def test_ten_paths_at_most(checkpoints):
    def other(key):
        return {f"layer_{i:02}": jnp.ones(3) for i in range(20)}

    with pytest.raises(zj.CheckpointError) as error:
        checkpoints.restore(1, states.zero().abstract(other, optax.sgd(0.1), KEY))
    lines = str(error.value).split("\n")
    assert len(lines) == 12 and lines[-1] == "  ..."
    assert lines[1].startswith("  params/layer_00: not in the checkpoint")


def test_a_misfit_skips_no_step(tmp_path, recwarn):
    states.saved(tmp_path, [1, 2])
    target = states.zero().abstract(lambda key: {"w": jnp.ones(3)}, states.tx, KEY)
    with (zj.Checkpointer(tmp_path) as checkpoints,
          pytest.raises(zj.CheckpointError, match=r"step 2 in .* does not fit") as error):
        checkpoints.restore_latest(target)
    assert not isinstance(error.value, zj.CorruptCheckpointError)
    assert not [w for w in recwarn if "skipped step" in str(w.message)]


def test_another_optimizer(checkpoints):
    other = states.target(tx=optax.adafactor(1e-3))
    with pytest.raises(zj.CheckpointError) as error:
        checkpoints.restore(1, other)
    assert ("another optimizer, which keeps ScaleByAdamState; the target's keeps FactoredState"
            ) in str(error.value)
    assert "params_only=True" in str(error.value)
    live = states.state(seed=4, tx=optax.adafactor(1e-3))
    found = checkpoints.restore(1, live, params_only=True).state
    assert states.bits(found.params) == states.bits(states.state(seed=1).params)
    with pytest.raises(zj.CheckpointError, match="leaves that are not restored, such as step, "
                                                 "would stay shapes; give a live state"):
        checkpoints.restore(1, other, params_only=True)


def test_another_dtype(checkpoints):
    target = states.target(states.zero(precision=zj.Precision(params="bfloat16")))
    with pytest.raises(zj.CheckpointError, match=r"write cast=True(.|\n)*params/w: "
                                                 r"float32\[64, 32\] in the checkpoint, bfloat16"):
        checkpoints.restore(1, target)
    found = checkpoints.restore(1, target, cast=True).state
    saved = states.state(seed=1).params
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), saved)
    assert states.bits(found.params) == states.bits(want)
    assert jax.tree.all(jax.tree.map(lambda x, t: (x.dtype, x.sharding) == (t.dtype, t.sharding),
                                     found, target))


@pytest.mark.parametrize("other", [jnp.int32, bool, jnp.uint32])
def test_floats_never_become_integers(checkpoints, other):
    target = with_param(states.target(), "w", dtype=other)
    name = jnp.dtype(other).name
    with pytest.raises(zj.CheckpointError,
                       match=rf"params/w: float32\[64, 32\] in the checkpoint, {name}"):
        checkpoints.restore(1, target, cast=True)


def test_keys_of_another_generator(checkpoints):
    state = states.state()
    rng = jax.device_put(jax.random.key(0, impl="rbg"), state.step.sharding)
    with pytest.raises(zj.CheckpointError, match=r"rng: threefry2x32 key uint32\[2\] in the "
                                                 r"checkpoint, rbg key uint32\[4\]"):
        checkpoints.restore(1, state.replace(rng=rng))


def test_a_sharding_that_does_not_divide(checkpoints):
    target = states.target()
    target = with_param(target, "odd", sharding=target.params["w"].sharding)
    with pytest.raises(zj.CheckpointError, match=r"the target's sharding does not divide "
                                                 r"params/odd of shape \(3, 5\)") as error:
        checkpoints.restore(1, target)
    assert not isinstance(error.value, zj.CorruptCheckpointError)


def test_sixty_four_bits_where_jax_has_thirty_two(tmp_path):
    x = np.random.default_rng(0).standard_normal((16, 4))
    sharding = states.state().params["w"].sharding
    target = {"step": 0, "w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)}
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save({"step": 1, "w": x})
        with pytest.raises(zj.CheckpointError, match=r"write cast=True"):
            checkpoints.restore(1, target)
        found = checkpoints.restore(1, target, cast=True).state["w"]
    assert found.sharding == sharding and states.bits(found) == states.bits(x.astype(np.float32))


@pytest.mark.parametrize("make", [
    lambda: jax.eval_shape(states.state),
    lambda: states.target(zj.Zero(zj.make_mesh(topology="h100:1x8"))),
], ids=["no shardings", "absent devices"])
def test_targets_without_devices(checkpoints, make):
    with pytest.raises(zj.CheckpointError, match="the target names no devices for 16 leaves, such "
                                                 r"as step; .* the result of zero\.abstract"):
        checkpoints.restore(1, make())


@pytest.mark.parametrize("only, text", [
    ("(", "is not a regular expression"),
    ("w", "only='w' matches none of the target's 16 leaves"),
])
def test_patterns_that_match_nothing(checkpoints, only, text):
    with pytest.raises(zj.CheckpointError, match=text):
        checkpoints.restore(1, states.target(), only=only)


def test_leaves_that_do_not_divide():
    """Another dimension is sharded, or the leaf stays whole and is reported.

    Each device holds as many bytes as the layout says.
    """
    def init(key):
        return {"second": jnp.ones((30, 64)), "neither": jnp.ones((30, 63)),
                "w": jnp.ones((64, 32))}

    policy = states.zero()
    state = policy.init(init, optax.sgd(0.1), KEY)
    layout = policy.layout(state)
    rows = {row.path: row for row in layout.rows}
    assert rows["params/second"].spec[1] == "data"
    assert rows["params/second"].bytes == 4 * 30 * 64 // 8
    assert "no free dimension of (30, 63) is divisible by 8" in rows["params/neither"].reason
    held = dict.fromkeys(policy.mesh.devices.flat, 0)
    for x in map(states.data_of, jax.tree.leaves(state)):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {layout.bytes}


def test_nan_in_the_part_of_one_device():
    """The step is skipped on every device; `max_skipped` consecutive ones raise."""
    def loss(params, x):
        return zj.Loss(states.loss_fn(params, x) * len(x), len(x))

    step = states.zero().train_step(loss, states.tx, max_skipped=2)
    bad = np.ones((8, 64), np.float32)
    bad[5] = np.nan
    before = states.state()
    want = states.bits((before.params, before.opt_state))
    state, metrics = step(before, bad)
    assert int(metrics["skipped"]) == 1
    assert states.bits((state.params, state.opt_state)) == want
    for x in jax.tree.leaves(state.params):
        whole = np.asarray(x)
        assert all(np.array_equal(shard.data, whole[shard.index]) for shard in x.addressable_shards)
    with pytest.raises(zj.NonFiniteError, match="2 consecutive steps"):
        for _ in range(4):
            state, _ = step(state, bad)
