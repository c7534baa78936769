"""A second copy within each host (ZeRO++'s hpZ) trains exactly like one device."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import quick
import zoo

import zerojax as zj

STEPS = 3
CASES = [("scanned_remat", "per_device", 1), ("scanned_remat", "global", 2),
         ("unrolled_remat", "per_device", 4), ("tied", "per_device", 1), ("rnn", "per_device", 1),
         ("nnx", "per_device", 2), ("resnet", "global", 1), ("scanned", "global", 1)]
QUICK = {("scanned_remat", "per_device", 1)}
MESHES = {"2x4": {"hosts": 2}, "4x2": {"hosts": 4}, "2x2x2": {"replica": 2, "hosts": 2}}


def zero_on(mesh="2x4", **settings):
    mesh = zj.make_mesh(devices=jax.devices()[:8], **MESHES[mesh])
    return zj.Zero(mesh, 3, min_shard=1, secondary="data", **settings)


def assert_equals_one_device(zero, name, accumulate):
    model, tx = zoo.MODELS[name](), zoo.OPTIMIZERS["momentum"]()
    batches = [model.batch(2 * zero.parts * accumulate, seed) for seed in range(STEPS)]
    params, _, losses = oracle.train(model, tx, batches, accumulate=accumulate)
    state = zero.init(model.init, tx)
    born = jax.tree.map(np.array, state.params)
    step = zero.train_step(model.loss, tx, accumulate=accumulate, compiler_options=oracle.QUICK)
    ours = []
    for batch in zj.feed(batches, zero):
        state, metrics = step(state, batch)
        ours.append(metrics["loss"])
    np.testing.assert_allclose(np.array(ours, float), losses, rtol=1e-5)
    oracle.assert_close(state.params, params, born, "float32")
    return state


@pytest.mark.parametrize("name, way, accumulate", quick.some(CASES, QUICK.__contains__))
def test_equals_one_device(name, way, accumulate):
    state = assert_equals_one_device(zero_on(gradients=way), name, accumulate)
    assert all(x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(state.params)
               if x.size > 512)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh(mesh):
    assert_equals_one_device(zero_on(mesh), "scanned_remat", 1)


@pytest.mark.slow
def test_a_policy_of_the_users_block_still_holds():
    """The second copy is kept besides what the block's own policy keeps."""
    policy = zj.remat.regather(jax.checkpoint_policies.dots_saveable)
    model = zoo._linen(zoo.Transformer(remat=True), zoo.masked_tokens, zoo._tokens)
    zero, batch = zero_on(), zoo._tokens(16, 0)

    def loss(variables, batch):
        return jax.checkpoint(model.loss, policy=policy)(variables, batch)

    tx = zoo.OPTIMIZERS["momentum"]()
    found = []
    for loss_fn in (model.loss, loss):
        step = zero.train_step(loss_fn, tx, compiler_options=oracle.QUICK)
        found.append(step(zero.init(model.init, tx), batch)[1])
    np.testing.assert_allclose(found[0]["grad_norm"], found[1]["grad_norm"], rtol=1e-5)


def test_states_move_between_meshes():
    zero, flat = zero_on(), zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), 3, min_shard=1)
    model, tx = zoo.MODELS["matrices"](), zoo.OPTIMIZERS["momentum"]()
    state = zero.init(model.init, tx)
    before = jax.tree.map(np.array, state.params)
    there = zero.move(state, flat)
    back = flat.move(there, zero)
    for x, y, z in zip(*map(jax.tree.leaves, (before, there.params, back.params)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
        assert z.sharding.spec != y.sharding.spec


@pytest.mark.parametrize("wrong, text", [
    ({"stage": 2, "secondary": "data"}, r"Zero\(stage=2.*write stage=3 on a mesh with an axis of"),
    ({"secondary": ("host", "data")}, r"over some of the axes of the state, but not all"),
    ({"secondary": "host"}, r"over the last of the axes.*write axis=\('data', 'host'\)"),
    ({"secondary": "other"}, r"secondary=\('other',\)\): the second copy"),
    ({"secondary": 1}, r"Zero\(secondary=1\): not the name of an axis"),
    ({"wire": "int8"}, r"Zero\(wire='int8'\): not a Wire; write zj.Wire\(gather=\"int8\"\)")])
def test_wrong_settings(wrong, text):
    settings = {"stage": 3} | wrong
    with pytest.raises(zj.PolicyError, match=text):
        zj.Zero(zj.make_mesh(devices=jax.devices()[:8], hosts=2), **settings)


def test_a_rule_names_all_axes_of_the_state():
    mesh = zj.make_mesh(devices=jax.devices()[:8], hosts=2)
    zero = zj.Zero(mesh, 3, rules={"w": jax.P(None, "data")}, min_shard=1)
    text = r"names \['data'\], .* sharded over all of \('host', 'data'\); write P\(None, \('ho"
    with pytest.raises(zj.LayoutError, match=text):
        zero.init(lambda: {"w": np.ones((8, 8), np.float32)}, zoo.OPTIMIZERS["momentum"]())


@pytest.mark.parametrize("offload", [False, True])
def test_policies_of_blocks_may_offload(offload):
    policies = jax.checkpoint_policies
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["h"] if offload else [],
        offload_src="device", offload_dst="pinned_host")

    def loss(params, x):
        block = jax.checkpoint(lambda w, x: (jnp.tanh(x @ w) ** 2).sum(), policy=policy)
        return zj.Loss(block(params["w"], x), x.shape[0])

    zero, tx = zero_on(), zoo.OPTIMIZERS["momentum"]()
    params, x = {"w": jnp.ones((64, 64)) / 64}, np.ones((16, 64), np.float32)
    _, metrics = zero.train_step(loss, tx)(zero.init(lambda: params, tx), x)
    assert float(metrics["loss"]) == pytest.approx(float(loss(params, x).total) / 16, rel=1e-5)


@pytest.mark.parametrize("hosts", [3, 0, "2"])
def test_hosts_that_do_not_divide(hosts):
    with pytest.raises(zj.PolicyError, match=r"divide"):
        zj.make_mesh(devices=jax.devices()[:8], hosts=hosts)
