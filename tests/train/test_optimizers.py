"""Any optax transform: its state is laid out without knowing it, and five steps on shards are those of one device."""

import jax
import numpy as np
import optax
import oracle
import pytest
import zoo

import zerojax as zj


def _spread(x):
    return not x.sharding.is_fully_replicated


@pytest.mark.parametrize("name", zoo.OPTIMIZERS)
def test_five_steps_equal_one_device(name):
    model, tx = zoo.MODELS["mlp"](), zoo.OPTIMIZERS[name]()
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), 3, min_shard=1)
    batches = [model.batch(16, seed) for seed in range(5)]
    theirs, _, losses = oracle.train(model, tx, batches)
    state, step = zero.init(model.init, tx), zero.train_step(model.loss, tx, compiler_options=oracle.QUICK)
    assert [x.shape for x in jax.tree.leaves(state.opt_state) if any(d % 8 == 0 for d in x.shape) and not _spread(x)] == []
    for batch, loss in zip(batches, losses, strict=True):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for ours, their in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, their, rtol=0, atol=1e-5 * np.abs(their).max())


def test_a_leaf_of_a_parameters_shape_under_its_path_lies_as_it_does():
    """Square matrices could be spread either way; momenta follow the parameter, whatever the path in front."""
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), 3, min_shard=1, rules={"w": jax.P("data")})
    for name in ("adamw", "chain", "inject", "multi_steps", "schedule_free", "if_finite"):
        state = zero.init(lambda: {"w": jax.numpy.ones((16, 16))}, zoo.OPTIMIZERS[name]())
        kept = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 16)]
        assert kept and {x.sharding.spec for x in kept} == {jax.P("data")}, name


REFUSED = {
    "lbfgs": (optax.lbfgs, r"the optimizer \(scale_by_zoom_linesearch\) can't be used .* 'value_fn'"),
    "sam, opaque": (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
                    r"the optimizer \(sam\) can't be used .*grad_fn must be provided"),
    "lookahead": (lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5), r"the optimizer \(lookahead\) can't be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_transforms_that_ask_for_more_are_refused_by_name(name):
    make, text = REFUSED[name]
    model, zero = zoo.MODELS["mlp"](), zj.Zero(zj.make_mesh(devices=jax.devices()[:8]))
    with pytest.raises(zj.PolicyError, match=text):
        zero.train_step(model.loss, make())(zero.init(model.init, make()), model.batch(16, 0))
