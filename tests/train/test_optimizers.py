"""Any optax transform: its state is laid out, and steps on shards equal those of one device."""

import jax
import numpy as np
import optax
import oracle
import pytest
import zoo

import zerojax as zj


def _zero(**settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), 3, **settings)


def _could_be_sharded(x):
    return x.sharding.is_fully_replicated and any(d % 8 == 0 for d in x.shape)


@pytest.mark.parametrize("name", zoo.OPTIMIZERS)
def test_five_steps_equal_one_device(name):
    model, tx, zero = zoo.MODELS["mlp"](), zoo.OPTIMIZERS[name](), _zero(min_shard=1)
    batches = [model.batch(16, seed) for seed in range(5)]
    theirs, _, losses = oracle.train(model, tx, batches)
    state = zero.init(model.init, tx)
    step = zero.train_step(model.loss, tx, compiler_options=oracle.QUICK)
    assert not any(map(_could_be_sharded, jax.tree.leaves(state.opt_state)))
    for batch, loss in zip(batches, losses, strict=True):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", ["adamw", "chain", "inject", "multi_steps", "schedule_free",
                                  "if_finite"])
def test_state_of_a_parameters_shape_and_path_has_its_spec(name):
    """Either dimension of a square matrix could be sharded; momenta follow their parameter.

    The keys in front of the parameter's path do not matter.
    """
    zero = _zero(min_shard=1, rules={"w": jax.P("data")})
    state = zero.init(lambda: {"w": jax.numpy.ones((16, 16))}, zoo.OPTIMIZERS[name]())
    momenta = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 16)]
    assert momenta
    assert {x.sharding.spec for x in momenta} == {jax.P("data")}


def _opaque_sam():
    return optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True)


def _lookahead():
    return optax.lookahead(optax.sgd(0.1), 5, 0.5)


REFUSED = {
    "lbfgs": (optax.lbfgs,
              r"the optimizer \(scale_by_zoom_linesearch\) cannot be used .* its update "
              r"receives only gradients, its state, the parameters and the loss, and it raised "
              r".*'value_fn'"),
    "sam, opaque": (_opaque_sam,
                    r"the optimizer \(sam\) cannot be used .*grad_fn must be provided"),
    "lookahead": (_lookahead, r"the optimizer \(lookahead\) cannot be used .*, and it raised"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_transform_that_needs_more_arguments_is_refused_by_name(name):
    make, text = REFUSED[name]
    model, zero = zoo.MODELS["mlp"](), _zero()
    with pytest.raises(zj.PolicyError, match=text):
        zero.train_step(model.loss, make())(zero.init(model.init, make()), model.batch(16, 0))
