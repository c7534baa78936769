"""Trees that Orbax wrote without zerojax: read onto any mesh, and never taken for damaged steps."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import states
from flax.training import train_state

import zerojax as zj


def flax_state(seed):
    params = {"w": jax.random.normal(jax.random.key(seed), (16, 6)), "b": jnp.full(3, seed + 0.5)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=states.tx)
    return state.apply_gradients(grads=params)


def save_tree(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, flax_state(1))


def save_item(path, item="default"):
    with ocp.CheckpointManager(path.parent) as manager:
        manager.save(int(path.name), args=ocp.args.Composite(
            **{item: ocp.args.StandardSave(flax_state(1)), "extra": ocp.args.JsonSave({"a": 1})}))


SAVES = {"a tree": (save_tree, "a"), "an item": (save_item, "7")}


@pytest.fixture(scope="module", params=SAVES)
def saved(request, tmp_path_factory):
    save, name = SAVES[request.param]
    path = tmp_path_factory.mktemp("orbax") / name
    save(path)
    return path


@pytest.mark.parametrize("policy", [{}, {"stage": 0, "devices": 2}], ids=str)
def test_a_flax_state_is_read_whole(saved, policy):
    state = states.zero(**policy).create(lambda: flax_state(0))
    found = zj.load_orbax(saved, state)
    assert states.bits(found) == states.bits(jax.tree.map(jnp.asarray, flax_state(1)))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, found, state))


def test_parameters_are_read_into_a_state(saved):
    policy = states.zero(devices=6, uneven="pad")
    state = policy.init(lambda: flax_state(0).params, states.tx)
    found = zj.load_orbax(saved, state, only="params/.*")
    for name, x in flax_state(1).params.items():
        np.testing.assert_array_equal(np.asarray(found.params[name]), x)
    assert states.bits(found.opt_state) == states.bits(state.opt_state)


def test_other_names_and_dtypes(saved):
    target = {"layer": {"w": jnp.zeros((16, 6), jnp.bfloat16)}}
    rename = {"^layer/": "params/"}
    with pytest.raises(zj.CheckpointError, match=r"float32\[16, 6\] in the checkpoint, bfloat16"):
        zj.load_orbax(saved, target, rename=rename)
    found = zj.load_orbax(saved, target, rename=rename, cast=True)["layer"]["w"]
    np.testing.assert_array_equal(found, flax_state(1).params["w"].astype(jnp.bfloat16))


def test_leaves_that_are_absent(saved):
    with pytest.raises(zj.CheckpointError, match=r"closest names in the files: \{'w': \['params/w"):
        zj.load_orbax(saved, {"w": jnp.zeros((16, 6))})
    with pytest.raises(zj.CheckpointError, match=r"params/w: float32\[16, 6\] .* float32\[6, 16\]"):
        zj.load_orbax(saved, {"params": {"w": jnp.zeros((6, 16))}})


@pytest.mark.parametrize("save, name, given", [(save_tree, "a", "a"), (save_item, "7", ".")])
def test_a_checkpointer_says_who_wrote_it(tmp_path, save, name, given):
    save(tmp_path / name)
    checkpoints = zj.Checkpointer(tmp_path / given)
    with pytest.raises(zj.CheckpointError, match=r"by Orbax without zerojax.*load_orbax") as caught:
        checkpoints.restore_latest(states.target(), if_none="none")
    assert not isinstance(caught.value, zj.CorruptCheckpointError)
    with pytest.raises(zj.CheckpointError, match="by Orbax without zerojax"):
        zj.export_safetensors(tmp_path / name, tmp_path / "m.safetensors")


def test_zerojaxs_own_steps_are_for_the_checkpointer(tmp_path):
    states.saved(tmp_path)
    with pytest.raises(zj.CheckpointError, match="was saved by zerojax; restore it with a zj"):
        zj.load_orbax(tmp_path, states.state())


def test_text_and_unfinished_saves_are_left_out(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": jnp.ones(3), "name": "mine"})
    (tmp_path / "b.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "b.orbax-checkpoint-tmp-1/_METADATA").touch()
    assert zj.load_orbax(tmp_path, {"w": jnp.zeros(3)})["w"].tolist() == [1, 1, 1]


def test_none_or_several_trees(tmp_path):
    with pytest.raises(zj.CheckpointError, match=r"has 0 trees that Orbax wrote \(none\)"):
        zj.load_orbax(tmp_path, states.state())
    for name in "ab":
        save_tree(tmp_path / name)
    with pytest.raises(zj.CheckpointError, match=r"has 2 trees that Orbax wrote \(a, b\); give"):
        zj.load_orbax(tmp_path, states.state())


def test_a_damaged_tree(tmp_path):
    save_tree(tmp_path / "a")
    for path in (tmp_path / "a/d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(zj.CorruptCheckpointError, match="a is unreadable: "):
        zj.load_orbax(tmp_path / "a", flax_state(0))
