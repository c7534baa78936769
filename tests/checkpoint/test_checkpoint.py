"""Saving and restoring where nothing is broken: bit for bit, on any mesh, at any stage."""

import functools
import itertools
import json
import math
import shutil

import flax.linen as nn
import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pairs
import pytest
import states
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.checkpoint import entries, reading

KEY = jax.random.key(0)
MESHES = {"8": {"devices": 8}, "4": {"devices": 4}, "2": {"devices": 2}, "1": {"devices": 1},
          "2x4": {"devices": 8, "replica": 2}}
STAGES = range(4)
# (stage, mesh) of a save and of a restore; every two values of these four factors occur together
CHANGES = [((row["stage"], row["mesh"]), (row["to_stage"], row["to_mesh"]))
           for row in pairs.rows({"stage": STAGES, "mesh": list(MESHES), "to_stage": STAGES,
                                  "to_mesh": list(MESHES)}, lambda row: True)]


def policy_of(stage, mesh):
    return states.zero(stage=stage, **MESHES[mesh])


def same_shardings(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, a, b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function of a stage and a mesh, which saves one and the same state under that policy.

    Returns (policy, state, the directory of its checkpoint).
    """
    first = states.state(step=7)

    @functools.cache
    def save(stage, mesh):
        policy = policy_of(stage, mesh)
        state = states.zero().move(first, policy)
        directory = tmp_path_factory.mktemp("ckpt")
        with zj.Checkpointer(directory, zero=policy) as checkpoints:
            checkpoints.save(state)
        return policy, state, directory

    return save


@pytest.mark.parametrize("source, to", CHANGES, ids=str)
def test_a_change_of_stage_and_mesh_keeps_every_bit(saved, source, to):
    policy, state, directory = saved(*source)
    other, want = policy_of(*to), states.bits(state)
    target = states.target(other)
    with zj.Checkpointer(directory) as checkpoints:
        found = checkpoints.restore_latest(target).state
    for changed in (found, policy.move(state, other)):
        assert states.bits(changed) == want and same_shardings(changed, target)
        assert jax.tree.structure(changed) == jax.tree.structure(target)


def test_arrays_are_read_onto_the_devices_of_the_target(saved, monkeypatch):
    """Not into the host's memory first, where they might not fit."""
    sources, read = {}, reading._read

    def spy(path, wanted):
        sources.update(wanted)
        return read(path, wanted)

    monkeypatch.setattr(reading, "_read", spy)
    target = states.target(policy_of(1, "4"))
    with zj.Checkpointer(saved(3, "8")[2]) as checkpoints:
        checkpoints.restore_latest(target)
    wanted = entries.by_path(target)
    assert {p: x.sharding for p, x in sources.items()} == {p: x.sharding for p, x in wanted.items()}


def test_digests_are_the_same_on_every_mesh(saved):
    digests = set()
    for stage, mesh in itertools.product(STAGES, MESHES):
        policy, _, directory = saved(stage, mesh)
        note = json.loads((directory / "7/manifest/metadata").read_text())
        assert note["stage"] == stage and note["mesh"] == dict(policy.mesh.shape)
        assert note["step"] == 7 and note["precision"]["params"] == "float32"
        assert note["optimizer"] == ["ScaleByAdamState"]
        digests.add(tuple(entry["digest"] for entry in note["leaves"].values()))
    assert len(digests) == 1


def test_training_continues_after_changes_of_stage_and_mesh():
    """Twelve steps under four policies give the result of twelve steps on one device."""
    batches = np.random.default_rng(0).standard_normal((12, 16, 64)).astype(np.float32)

    def trained(policy, state, part):
        step = policy.train_step(states.loss_fn, states.tx)
        for x in part:
            state, _ = step(state, x)
        return state

    alone = trained(states.zero(1), states.state(states.zero(1)), batches)
    policy, state = states.zero(), states.state()
    for i, change in enumerate([(0, "8"), (2, "4"), (1, "2x4"), (3, "2")]):
        other = policy_of(*change)
        state = trained(other, policy.move(state, other), batches[3 * i:3 * i + 3])
        policy = other
    assert int(state.step) == int(alone.step) == 12
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_move_refuses_another_dtype_and_absent_devices():
    policy = states.zero()
    with pytest.raises(zj.PolicyError, match="from float32 parameters to bfloat16"):
        policy.move(states.state(), states.zero(precision=zj.Precision(params="bfloat16")))
    with pytest.raises(zj.PolicyError, match="simulated GPUs, which hold no arrays"):
        policy.move(states.state(), zj.Zero(zj.make_mesh(topology="h100:1x8")))


def test_move_starts_a_loss_scale_where_one_is_needed():
    scaled = states.zero(precision=zj.Precision(compute="float16"))
    moved = states.zero().move(states.state(), scaled)
    assert moved.scale.metrics()["loss_scale"] == 2.0**16
    assert states.zero().move(moved, states.zero()).scale.metrics() == {}


def test_every_and_keep(tmp_path):
    with zj.Checkpointer(tmp_path, every=10, keep=2) as checkpoints:
        begun = []
        for step in range(1, 61):
            state = states.state(step=step) if step % 10 == 0 else None
            if checkpoints.save(state, step=step):
                begun.append(step)
        checkpoints.save(states.state(step=63), force=True)
        checkpoints.wait()
        assert begun == [10, 20, 30, 40, 50, 60] and checkpoints.steps() == [60, 63]
        assert not checkpoints.save(states.state(step=63), force=True)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    step = states.zero().train_step(states.loss_fn, states.tx)
    state, want = states.state(step=0), []
    with zj.Checkpointer(tmp_path, keep=None) as checkpoints:
        for _ in range(6):
            want.append(states.bits(state))
            checkpoints.save(state)
            for _ in range(3):
                state, _ = step(state, np.ones((8, 64), np.float32))
        for i, bits in enumerate(want):
            assert states.bits(checkpoints.restore(3 * i, states.target()).state) == bits


def test_data_state_and_metrics(tmp_path):
    position = {"at": bytes(range(256)), "n": np.int64(3), "bytes": (1, 2), "x": {"bytes": 1024}}
    metrics = {"loss": jnp.float32(1.5), "aux": {"n": np.float32(2), "nan": float("nan")}}
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(states.state(), data_state=position, metrics=metrics)
        found = checkpoints.restore_latest(states.target())
    assert found.data_state == position | {"bytes": [1, 2]} and found.step == 0
    assert found.metrics["loss"] == 1.5 and found.metrics["aux"]["n"] == 2
    assert math.isnan(found.metrics["aux"]["nan"])


@pytest.mark.parametrize("value, text", [
    (np.zeros(3), r"data_state that JSON cannot represent, of type ndarray: array"),
    ({"a": [0, {1}]}, r"data_state\['a'\]\[1\] that"),
    ({3: 1}, "data_state with the key 3; keys must be text"),
    ({"__bytes__": 1}, "with the key '__bytes__'")], ids=str)
def test_data_states_that_cannot_be_saved(tmp_path, value, text):
    with zj.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(zj.CheckpointError, match=text):
            checkpoints.save(states.state(step=1), data_state=value)
        assert checkpoints.steps() == []


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def flax_state():
    params = states.init(jax.random.key(0))
    return train_state.TrainState.create(apply_fn=Net().apply, params=params, tx=states.tx)


MAKERS = {
    "linen": lambda policy: policy.init(Net().init, states.tx, KEY, jnp.ones((2, 4))),
    "nnx": lambda policy: policy.init(lambda key: NnxNet(nnx.Rngs(key)), states.tx, KEY),
    "flax": lambda policy: policy.create(flax_state),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_any_state(tmp_path, kind):
    state = MAKERS[kind](states.zero())
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore_latest(state).state
    assert states.bits(found) == states.bits(state)
    assert jax.tree.structure(found) == jax.tree.structure(state)


def test_numbers_keys_and_arrays_of_the_host(tmp_path):
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 4)
    state = {"step": 3, "rate": 0.1, "host": np.arange(4.0), "w": jnp.ones(3), "keys": keys}
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore(3, state).state
    assert (found["step"], found["rate"]) == (3, 0.1) and type(found["step"]) is int
    assert found["host"].dtype == np.float64 and isinstance(found["host"], np.ndarray)
    assert found["keys"].dtype == keys.dtype and states.bits(found["keys"]) == states.bits(keys)


def test_parameters_alone(tmp_path):
    states.saved(tmp_path, [1])
    other = states.state(tx=optax.sgd(0.1, momentum=0.9), seed=5)
    with zj.Checkpointer(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(other, params_only=True).state
        assert states.bits(found.params) == states.bits(states.state(seed=1).params)
        assert states.bits(found.opt_state) == states.bits(other.opt_state)
        assert int(found.step) == 0
        some = checkpoints.restore(1, other, only="params/(w|odd)").state
        assert states.bits(some.params["w"]) == states.bits(found.params["w"])
        assert states.bits(some.params["half"]) == states.bits(other.params["half"])
        bare = states.zero().abstract(states.init, optax.identity(), KEY)
        rest = checkpoints.restore(1, bare, only="(?!opt_state).*").state
        assert states.bits(rest.params) == states.bits(found.params)


def test_an_empty_directory(tmp_path):
    target = states.target()
    with zj.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(target, if_none="none") is None
        with pytest.raises(zj.CheckpointError, match=r"has no checkpoint\. If this may be the "
                                                     'first run, write if_none="none"'):
            checkpoints.restore_latest(target)
        with pytest.raises(zj.CheckpointError, match=r"has no step 4; it has none"):
            checkpoints.restore(4, target)
        with pytest.raises(zj.CheckpointError, match='write "raise" or "none"'):
            checkpoints.restore_latest(target, if_none=lambda: None)


W = {"w": jnp.ones(3)}
# name: (saves that end in an error, words of its text)
WRONG = {
    "a step that is not the state's": (lambda c: c.save(states.state(step=3), step=4),
                                       "step=4 and a state of step 3"),
    "a state without a step": (lambda c: c.save(W), r"save\(state, step=...\)"),
    "text in a state": (lambda c: c.save({"step": 1, "name": "x"}),
                        r"\['name'\] are neither arrays nor numbers"),
    "shapes": (lambda c: c.save(states.target(), step=3), "given shapes, not arrays"),
    "an earlier step": (lambda c: [c.save(states.state(step=n)) for n in (5, 4)],
                        "has step 5, so step 4 cannot be saved"),
    "a step that is a float": (lambda c: c.save(W, step=3.0),
                               "step=3.0; write a whole number, 0 or more"),
    "a step that is a bool": (lambda c: c.save(W, step=True), "step=True; write a whole number"),
    "a negative step": (lambda c: c.save(W, step=-1), "step=-1; write a whole number"),
    "None": (lambda c: c.save(None, step=1), "a state that contains no array"),
    "functions": (lambda c: c.save({"step": 1, "f": jnp.sin}),
                  r"\['f'\] are neither .* eqx\.filter"),
    "two leaves with one path": (lambda c: c.save({"step": 1, "a/b": W["w"], "a": {"b": W["w"]}}),
                                 r"two leaves at each of \['a/b'\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_save_refuses(tmp_path, name):
    act, text = WRONG[name]
    with zj.Checkpointer(tmp_path) as checkpoints, pytest.raises(zj.CheckpointError, match=text):
        act(checkpoints)
    assert zj.Checkpointer(tmp_path).steps() == ([5] if name == "an earlier step" else [])


def test_a_step_that_was_moved_away_is_saved_again(tmp_path):
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        for step in (5, 10):
            checkpoints.save(states.state(step=step))
        checkpoints.wait()
        shutil.move(tmp_path / "c/10", tmp_path / "10")
        assert checkpoints.save(states.state(step=10))
        assert not checkpoints.save(states.state(step=10))  # its save is in progress
    assert checkpoints.steps() == [5, 10]


def test_others_may_restore_during_saves(tmp_path):
    with zj.Checkpointer(tmp_path) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(states.state(step=step))
            with zj.Checkpointer(tmp_path) as reader:
                reader.restore_latest(states.target(), if_none="none")
    assert checkpoints.steps() == [3, 4, 5]


def test_closing_twice_and_use_after_it(tmp_path):
    checkpoints = zj.Checkpointer(tmp_path)
    checkpoints.save(states.state(step=1))
    checkpoints.close()
    checkpoints.close()
    for use in (lambda: checkpoints.save(states.state(step=2)),
                lambda: checkpoints.restore(1, states.target()),
                lambda: checkpoints.restore_latest(states.target())):
        with pytest.raises(zj.CheckpointError, match="was closed; create another"):
            use()
    assert checkpoints.steps() == [1]


def test_with_another_mesh_set(tmp_path):
    state = states.state()
    policies = [states.zero(8), states.zero(2), states.zero(4, stage=0)]
    targets = [states.target(policy) for policy in policies]
    with jax.set_mesh(states.zero(4).mesh), zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        for target in targets:
            found = checkpoints.restore_latest(target).state
            assert states.bits(found) == states.bits(state)
        assert checkpoints.verify(0).step == 0


def test_a_flax_loop_continues_from_the_result_of_create(tmp_path):
    """Its step is a Python number until a step was jitted."""
    jitted = jax.jit(lambda state: state.replace(step=state.step + 7))(flax_state())
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(flax_state())
        checkpoints.save(jitted)
        assert checkpoints.restore_latest(flax_state()).state.step == 7
        assert checkpoints.restore(0, jitted).state.step == 0


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        return nn.Dense(64, kernel_init=init)(x)


def test_tensor_parallel_axes_return_after_a_move():
    """A state keeps the model's axis in mind on a mesh that does not have it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    wide, narrow = zj.Zero(mesh, min_shard=1), states.zero()
    state = wide.init(Partitioned().init, states.tx, KEY, jnp.ones((1, 32)))
    moved = wide.move(state, narrow)
    back = narrow.move(moved, wide)
    assert jax.tree.structure(back) == jax.tree.structure(moved) == jax.tree.structure(state)
    assert same_shardings(back, state) and states.bits(back) == states.bits(state)
    assert back.params["Dense_0"]["kernel"].sharding.spec == P("data", "model")
    assert moved.params["Dense_0"]["kernel"].sharding.spec == P(None, "data")


@pytest.mark.parametrize("options", [{"keep": 0}, {"every": 0}, {"every": 1.5}], ids=str)
def test_a_checkpointer_refuses(tmp_path, options):
    with pytest.raises(zj.CheckpointError, match="write a whole number, 1 or more"):
        zj.Checkpointer(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_feed_knows_its_position():
    policy, read = states.zero(), []

    def make(i):
        read.append(i)
        return np.full((8, 1), i)

    fed = zj.feed(zj.Indexed(make, stop=9), policy, prefetch=3)
    assert [int(next(fed)[0, 0]) for _ in range(2)] == [0, 1]
    assert max(read) > 2  # it reads ahead, which must not count
    assert fed.get_state() == {"next": 2}
    again = zj.feed(zj.Indexed(make, stop=9), policy)
    again.set_state(fed.get_state())
    assert [int(x[0, 0]) for x in again] == [int(x[0, 0]) for x in fed] == list(range(2, 9))
    fed.set_state({"next": 8})
    assert [int(x[0, 0]) for x in fed] == [8] and fed.get_state() == {"next": 9}


class Live:
    """A source that changes the position that it returned."""

    def __init__(self):
        self.state = {"n": 0}

    def __iter__(self):
        return self

    def __next__(self):
        self.state["n"] += 1
        return np.ones((8, 1))

    def get_state(self):
        return self.state


def test_a_source_that_changes_the_position_it_returned():
    fed = zj.feed(Live(), states.zero(), prefetch=3)
    next(fed)
    assert fed.get_state() == {"n": 1}


def test_feed_of_a_source_without_a_position():
    fed = zj.feed(iter([np.ones((8, 1))]), states.zero())
    next(fed)
    for act in (fed.get_state, lambda: fed.set_state(0)):
        with pytest.raises(zj.BatchError, match="list_iterator, which has no get_state"):
            act()


def grain_batches():
    shuffled = grain.MapDataset.range(64).shuffle(seed=1)
    return shuffled.map(np.float32).batch(8).to_iter_dataset()


def test_grains_iterators_resume(tmp_path):
    whole = [x.tolist() for x in zj.feed(grain_batches(), states.zero())]
    fed = zj.feed(grain_batches(), states.zero())
    list(itertools.islice(fed, 3))
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(states.state(), data_state=fed)
        position = checkpoints.restore_latest(states.target()).data_state
    again = zj.feed(grain_batches(), states.zero())
    again.set_state(position)
    assert [x.tolist() for x in again] == whole[3:]
