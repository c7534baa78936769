"""Saving and restoring where nothing is broken: bit for bit, on any mesh, at any stage."""

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
import pytest
import states
from flax.training import train_state
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import zerojax as zj

MESHES = {"8": {"devices": 8}, "4": {"devices": 4}, "2": {"devices": 2}, "1": {"devices": 1}, "2x4": {"devices": 8, "replica": 2}}
POLICIES = [(stage, mesh) for stage in range(4) for mesh in MESHES]


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """The same state under each policy: (policy, state, the directory of its checkpoint)."""
    made, first = {}, states.state(step=7)
    for stage, mesh in POLICIES:
        policy = states.zero(stage=stage, **MESHES[mesh])
        moved = states.zero().move(first, policy)
        directory = tmp_path_factory.mktemp("ckpt")
        with zj.Checkpointer(directory, zero=policy) as checkpoints:
            checkpoints.save(moved)
        made[stage, mesh] = policy, moved, directory
    return made


@pytest.mark.parametrize("source", POLICIES, ids=str)
def test_every_pair_of_stages_and_meshes_is_bit_equal(everywhere, source):
    policy, state, directory = everywhere[source]
    want = states.bits(state)
    with zj.Checkpointer(directory) as checkpoints:
        for other, *_ in everywhere.values():
            target = states.target(other)
            found = checkpoints.restore_latest(target)
            assert states.bits(found.state) == want
            assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, found.state, target))
            assert jax.tree.structure(found.state) == jax.tree.structure(target)
            live = policy.move(state, other)
            assert states.bits(live) == want
            assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, live, target))


def test_the_manifest_is_the_same_for_every_mesh(everywhere):
    digests = set()
    for policy, _, directory in everywhere.values():
        note = json.loads((directory / "7/manifest/metadata").read_text())
        assert note["stage"] == policy.stage and note["mesh"] == dict(policy.mesh.shape) and note["step"] == 7
        assert note["precision"]["params"] == "float32" and note["optimizer"] == ["ScaleByAdamState"]
        digests.add(tuple(entry["digest"] for entry in note["leaves"].values()))
    assert len(digests) == 1


def test_training_goes_on_after_a_change_of_stage_and_mesh(everywhere):
    """Twelve steps through five policies, as twelve on one device."""
    batches = np.random.default_rng(0).standard_normal((12, 16, 64)).astype(np.float32)

    def trained(policy, state, part):
        step = policy.train_step(states.loss_fn, states.tx)
        for x in part:
            state, _ = step(state, x)
        return state

    alone = trained(states.zero(1), states.state(states.zero(1)), batches)
    policy, state = states.zero(), states.state()
    for i, (stage, mesh) in enumerate([(0, "8"), (2, "4"), (1, "2x4"), (3, "2"), (3, "8")]):
        other = states.zero(stage=stage, **MESHES[mesh])
        policy, state = other, policy.move(state, other)
        state = trained(policy, state, batches[i * 3:i * 3 + 3] if i < 4 else batches[12:])
    assert int(state.step) == int(alone.step) == 12
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_move_refuses_another_dtype_and_absent_devices():
    policy = states.zero()
    with pytest.raises(zj.PolicyError, match="from float32 parameters to bfloat16"):
        policy.move(states.state(), states.zero(precision=zj.Precision(params="bfloat16")))
    with pytest.raises(zj.PolicyError, match="GPUs that are not there"):
        policy.move(states.state(), zj.Zero(zj.make_mesh(topology="h100:1x8")))


def test_move_starts_a_loss_scale_where_one_is_needed():
    moved = states.zero().move(states.state(), states.zero(precision=zj.Precision(compute="float16")))
    assert moved.scale.metrics()["loss_scale"] == 2.0**16
    assert states.zero().move(moved, states.zero()).scale.metrics() == {}


def test_every_and_keep(tmp_path):
    with zj.Checkpointer(tmp_path, every=10, keep=2) as checkpoints:
        begun = [step for step in range(1, 61) if checkpoints.save(states.state(step=step) if step % 10 == 0 else None, step=step)]
        checkpoints.save(states.state(step=63), force=True)
        checkpoints.wait()
        assert begun == [10, 20, 30, 40, 50, 60] and checkpoints.steps() == [60, 63]
        assert not checkpoints.save(states.state(step=63), force=True)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    policy, state = states.zero(), states.state(step=0)
    step, want = policy.train_step(states.loss_fn, states.tx), []
    with zj.Checkpointer(tmp_path, keep=None) as checkpoints:
        for _ in range(6):
            want.append(states.bits(state))
            checkpoints.save(state)
            for _ in range(3):
                state, _ = step(state, np.ones((8, 64), np.float32))
        for i, bits in enumerate(want):
            assert states.bits(checkpoints.restore(3 * i, states.target()).state) == bits


def test_what_is_saved_beside_the_state(tmp_path):
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(states.state(), data_state={"at": b"\x00\xff", "n": np.int64(3), "bytes": (1, 2), "x": {"bytes": 1024}},
                         metrics={"loss": jnp.float32(1.5), "aux": {"n": np.float32(2), "nan": float("nan")}})
        found = checkpoints.restore_latest(states.target())
        assert found.data_state == {"at": b"\x00\xff", "n": 3, "bytes": [1, 2], "x": {"bytes": 1024}} and found.step == 0
        assert found.metrics["loss"] == 1.5 and found.metrics["aux"]["n"] == 2 and math.isnan(found.metrics["aux"]["nan"])


@pytest.mark.parametrize("value, text", [
    (np.zeros(3), r"data_state that JSON can't hold, a ndarray: array"), ({"a": [0, {1}]}, r"data_state\['a'\]\[1\] that"),
    ({3: 1}, "data_state with the key 3; keys are text"), ({"__bytes__": 1}, "with the key '__bytes__'")], ids=str)
def test_what_can_not_be_saved_beside_it(tmp_path, value, text):
    with zj.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(zj.CheckpointError, match=text):
            checkpoints.save(states.state(step=1), data_state=value)
        assert checkpoints.steps() == []


@pytest.mark.parametrize("kind", ["linen", "nnx", "flax"])
def test_any_state(tmp_path, kind):
    policy, make = states.zero(), MAKERS[kind]
    state = make(policy)
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore_latest(state)
        assert states.bits(found.state) == states.bits(state)
        assert jax.tree.structure(found.state) == jax.tree.structure(state)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))


def _linen(policy):
    return policy.init(Net().init, states.tx, jax.random.key(0), jnp.ones((2, 4)))


def _nnx(policy):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(4, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    return policy.init(lambda key: Model(nnx.Rngs(key)), states.tx, jax.random.key(0))


def _flax(policy):
    params = lambda: states.init(jax.random.key(0))
    return policy.create(lambda: train_state.TrainState.create(apply_fn=Net().apply, params=params(), tx=states.tx))


MAKERS = {"linen": _linen, "nnx": _nnx, "flax": _flax}


def test_numbers_and_arrays_of_the_host_come_back_as_they_were(tmp_path):
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 4)
    state = {"step": 3, "rate": 0.1, "host": np.arange(4.0), "w": jnp.ones(3), "keys": keys}
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore(3, state).state
    assert (found["step"], found["rate"]) == (3, 0.1) and type(found["step"]) is int
    assert found["host"].dtype == np.float64 and isinstance(found["host"], np.ndarray)
    assert found["keys"].dtype == state["keys"].dtype and states.bits(found["keys"]) == states.bits(state["keys"])


def test_parameters_alone(tmp_path):
    states.saved(tmp_path, [1])
    other = states.state(tx=optax.sgd(0.1, momentum=0.9), seed=5)
    with zj.Checkpointer(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(other, params_only=True).state
        assert states.bits(found.params) == states.bits(states.state(seed=1).params)
        assert states.bits(found.opt_state) == states.bits(other.opt_state) and int(found.step) == 0
        some = checkpoints.restore(1, other, only="params/(w|odd)").state
        assert states.bits(some.params["w"]) == states.bits(found.params["w"])
        assert states.bits(some.params["half"]) == states.bits(other.params["half"])
        bare = states.zero().abstract(states.init, optax.identity(), jax.random.key(0))
        assert states.bits(checkpoints.restore(1, bare, only="(?!opt_state).*").state.params) == states.bits(found.params)


def test_none_there(tmp_path):
    with zj.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(states.target(), if_none="none") is None
        with pytest.raises(zj.CheckpointError, match='holds no checkpoint; in a first run write if_none="none"'):
            checkpoints.restore_latest(states.target())
        with pytest.raises(zj.CheckpointError, match=r"has no step 4; it has none"):
            checkpoints.restore(4, states.target())
        with pytest.raises(zj.CheckpointError, match='write "raise" or "none"'):
            checkpoints.restore_latest(states.target(), if_none=lambda: None)


WRONG = {
    "a step that is not the state's": (lambda c: c.save(states.state(step=3), step=4), "step=4 and a state of step 3"),
    "a state without a step": (lambda c: c.save({"w": jnp.ones(3)}), r"save\(state, step=...\)"),
    "text in a state": (lambda c: c.save({"step": 1, "name": "x"}), r"\['name'\] are neither arrays nor numbers"),
    "shapes": (lambda c: c.save(states.target(), step=3), "given shapes, not arrays"),
    "an earlier step": (lambda c: [c.save(states.state(step=n)) for n in (5, 4)], "has step 5, and is to get step 4"),
    "a step that is no number": (lambda c: c.save({"w": jnp.ones(3)}, step=3.0), "step=3.0; write a whole number, 0 or more"),
    "a truth": (lambda c: c.save({"w": jnp.ones(3)}, step=True), "step=True; write a whole number"),
    "a step below 0": (lambda c: c.save({"w": jnp.ones(3)}, step=-1), "step=-1; write a whole number"),
    "nothing": (lambda c: c.save(None, step=1), "a state that holds no array"),
    "functions": (lambda c: c.save({"step": 1, "f": jnp.sin}), r"\['f'\] are neither .* eqx.filter"),
    "two leaves of one path": (lambda c: c.save({"step": 1, "a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}), "two leaves at each of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_save_refuses(tmp_path, name):
    act, text = WRONG[name]
    with zj.Checkpointer(tmp_path) as checkpoints, pytest.raises(zj.CheckpointError, match=text):
        act(checkpoints)
    assert zj.Checkpointer(tmp_path).steps() in ([], [5])


def test_a_step_that_was_moved_away_is_saved_again(tmp_path):
    with zj.Checkpointer(tmp_path / "c") as checkpoints:
        for step in (5, 10):
            checkpoints.save(states.state(step=step))
        checkpoints.wait()
        shutil.move(tmp_path / "c/10", tmp_path / "10")
        assert checkpoints.save(states.state(step=10))
        assert not checkpoints.save(states.state(step=10))  # it is under way
    assert checkpoints.steps() == [5, 10]


def test_others_may_restore_while_one_saves(tmp_path):
    with zj.Checkpointer(tmp_path) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(states.state(step=step))
            with zj.Checkpointer(tmp_path) as reader:
                reader.restore_latest(states.target(), if_none="none")
    assert checkpoints.steps() == [3, 4, 5]


def test_closing_twice_and_going_on(tmp_path):
    checkpoints = zj.Checkpointer(tmp_path)
    checkpoints.save(states.state(step=1))
    checkpoints.close()
    checkpoints.close()
    assert checkpoints.save(states.state(step=2)) and checkpoints.restore_latest(states.target()).step == 2
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_where_another_mesh_is_set(tmp_path):
    state, targets = states.state(), [states.target(policy) for policy in (states.zero(8), states.zero(2), states.zero(4, 0))]
    with jax.set_mesh(states.zero(4).mesh), zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        for target in targets:
            assert states.bits(checkpoints.restore_latest(target).state) == states.bits(state)
        assert checkpoints.verify(0).step == 0


def test_a_flax_loop_goes_on_from_what_create_returns(tmp_path):
    """Its step is a Python number until a step was jitted."""
    make = lambda: train_state.TrainState.create(apply_fn=Net().apply, params=states.init(jax.random.key(0)), tx=states.tx)
    jitted = jax.jit(lambda state: state.replace(step=state.step + 7))(make())
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(make())
        checkpoints.save(jitted)
        assert checkpoints.restore_latest(make()).state.step == 7
        assert checkpoints.restore(0, jitted).state.step == 0


def test_tensor_parallel_axes_come_back_after_a_move():
    """A mesh without the model's axis does not make a state forget it."""
    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(64, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model")))(x)

    wide = zj.Zero(jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2), min_shard=1)
    narrow = states.zero()
    state = wide.init(Partitioned().init, states.tx, jax.random.key(0), jnp.ones((1, 32)))
    moved = wide.move(state, narrow)
    back = narrow.move(moved, wide)
    assert jax.tree.structure(back) == jax.tree.structure(moved) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, back, state))
    assert back.params["Dense_0"]["kernel"].sharding.spec == P("data", "model")
    assert moved.params["Dense_0"]["kernel"].sharding.spec == P(None, "data") and states.bits(back) == states.bits(state)


@pytest.mark.parametrize("options", [{"keep": 0}, {"every": 0}, {"every": 1.5}])
def test_what_a_checkpointer_refuses(tmp_path, options):
    with pytest.raises(zj.CheckpointError, match="write a whole number, 1 or more"):
        zj.Checkpointer(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_feed_knows_where_it_is():
    policy = states.zero()
    read = []

    def make(i):
        read.append(i)
        return np.full((8, 1), i)

    fed = zj.feed(zj.Indexed(make, stop=9), policy, prefetch=3)
    assert [int(next(fed)[0, 0]) for _ in range(2)] == [0, 1] and max(read) > 2  # it fetches ahead
    assert fed.get_state() == {"next": 2}
    again = zj.feed(zj.Indexed(make, stop=9), policy)
    again.set_state(fed.get_state())
    assert [int(x[0, 0]) for x in again] == [int(x[0, 0]) for x in fed] == list(range(2, 9))
    fed.set_state({"next": 8})
    assert [int(x[0, 0]) for x in fed] == [8] and fed.get_state() == {"next": 9}


def test_a_source_that_goes_on_with_the_position_it_gave():
    class Live:
        def __init__(self):
            self.state = {"n": 0}

        def __iter__(self):
            return self

        def __next__(self):
            self.state["n"] += 1
            return np.ones((8, 1))

        def get_state(self):
            return self.state

    fed = zj.feed(Live(), states.zero(), prefetch=3)
    next(fed)
    assert fed.get_state() == {"n": 1}


def test_feed_of_what_has_no_position():
    fed = zj.feed(iter([np.ones((8, 1))]), states.zero())
    next(fed)
    for act in (fed.get_state, lambda: fed.set_state(0)):
        with pytest.raises(zj.BatchError, match="list_iterator, which has no get_state"):
            act()


def test_grains_iterators_resume(tmp_path):
    make = lambda: grain.MapDataset.range(64).shuffle(seed=1).map(np.float32).batch(8).to_iter_dataset()
    fed = zj.feed(make(), states.zero())
    whole = [np.asarray(x) for x in zj.feed(make(), states.zero())]
    list(itertools.islice(fed, 3))
    with zj.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(states.state(), data_state=fed)
        position = checkpoints.restore_latest(states.target()).data_state
    again = zj.feed(make(), states.zero())
    again.set_state(position)
    assert [x.tolist() for x in map(np.asarray, again)] == [x.tolist() for x in whole[3:]]
