"""`Zero.whole_matrices`: a run equals that of the transform alone on one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import small
import zoo
from flax import nnx

import zerojax as zj

STACKED = {"scanned": "Scan.*", "unrolled": None, "nnx": None}


def muon(stacked=None, **settings):
    dimensions = zj.muon_dimensions(stacked=stacked)
    return optax.contrib.muon(0.02, adam_learning_rate=1e-2, adam_eps_root=1e-6, weight_decay=0.1,
                              muon_weight_dimension_numbers=dimensions, **settings)


def shampoo(stacked=None):
    """Preconditions each matrix (the last two dimensions) from both sides, by its gradients."""

    def init(params):
        return {side: jax.tree.map(functools.partial(_squares, side), params)
                for side in ("left", "right")}

    def update(grads, state, params=None):
        state = {side: jax.tree.map(lambda s, g, side=side: 0.9 * s + _squares(side, g),
                                    state[side], grads) for side in state}
        updates = jax.tree.map(_preconditioned, grads, state["left"], state["right"])
        return updates, state

    return optax.chain(optax.GradientTransformation(init, update), optax.sgd(0.02, momentum=0.9))


def _squares(side, g):
    if g.ndim < 2:
        return jnp.zeros(g.shape)
    return g @ g.mT if side == "left" else g.mT @ g


def _preconditioned(g, left, right):
    return g if g.ndim < 2 else _root(left) @ g @ _root(right)


def _root(square):
    ridge = jnp.broadcast_to(1e-3 * jnp.eye(square.shape[-1]), square.shape)
    values, vectors = jnp.linalg.eigh(square + ridge)
    return (vectors * values[..., None, :] ** -0.25) @ vectors.mT


def trust(stacked=None):
    return optax.lamb(1e-2, eps_root=1e-6)


OPTIMIZERS = {"muon": muon, "shampoo": shampoo, "lamb": trust}


def trained(zero, model, tx, batches, **settings):
    step = zero.train_step(model.loss, tx, compiler_options=oracle.QUICK, **settings)
    state = zero.init(model.init, tx)
    for batch in batches:
        state, _ = step(state, batch)
    return state


def assert_equal(state, theirs, tolerance=3e-5):
    ours = jax.tree.leaves(zj.logical(state.params))
    for a, b in zip(ours, jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("name, case, stage", [
    *itertools.product(["muon"], STACKED, [1, 2, 3]),
    *itertools.product(["shampoo"], ["unrolled"], [1, 2, 3]),
    ("shampoo", "scanned", 3), ("shampoo", "nnx", 3), ("lamb", "scanned", 3)])
def test_steps_equal_one_device(name, case, stage):
    model, tx, zero = zoo.MODELS[case](), OPTIMIZERS[name](STACKED[case]), small.zero(stage=stage)
    batches = [model.batch(16, seed) for seed in range(3)]
    theirs, _, _ = oracle.train(model, tx, batches)
    assert_equal(trained(zero, model, zero.whole_matrices(tx), batches), theirs)


# stacks that divide over 8 devices, that do not, and that are shorter; matrices that are alike and
# one that is not; heads; and what Adam gets
SHAPES = {"even": (8, 16, 8), "uneven": (12, 8, 16), "short": (3, 16, 8), "lone": (24, 8),
          "heads": (8, 16, 2, 4), "table": (32, 8), "bias": (16,),
          **{f"alike_{i}": (16, 24) for i in range(3)}}
D = optax.contrib.MuonDimensionNumbers
DIMENSIONS = {name: D(-2, -1) for name in SHAPES} | {"heads": D(-3, (-2, -1)), "table": None,
                                                     "bias": None}


def of_tree():
    return optax.contrib.muon(0.1, weight_decay=0.1, muon_weight_dimension_numbers=DIMENSIONS)


def draws(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in SHAPES.items()}


def steps(tx, zero=None, count=2):
    """Returns the state after updates by given gradients, in a loop of its own."""

    def step(state, grads):
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def create():
        return {"params": draws(0), "opt_state": tx.init(draws(0))}

    state = zero.create(create) if zero else create()
    jitted = zero.jit(step, batch_argnums=()) if zero else jax.jit(step)
    for seed in range(count):
        state = jitted(state, draws(1 + seed))
    return state


def replicated():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8], replica=2), min_shard=1)


def on_two_axes():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("host", "gpu"), axis_types=auto, devices=jax.devices()[:8])
    return zj.Zero(mesh, axis=("host", "gpu"), min_shard=1)


@pytest.mark.parametrize("make", [small.zero, pytest.param(replicated, marks=pytest.mark.slow),
                                  pytest.param(on_two_axes, marks=pytest.mark.slow)])
def test_stacks_of_all_kinds_equal_one_device(make):
    zero = make()
    ours, theirs = steps(zero.whole_matrices(of_tree()), zero), steps(of_tree())
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def moves(update, *args):
    """Returns the number of arrays that an update moves, by the name of the scope."""
    eqns = jax.make_jaxpr(update)(*args).jaxpr.eqns
    return sum(eqn.primitive.name == "sharding_constraint" for eqn in eqns)


@pytest.mark.parametrize("tx", [optax.adamw(0.1), optax.lamb(0.1), optax.fromage(0.1),
                                optax.adafactor(0.1, min_dim_size_to_factor=8)])
def test_a_transform_without_products_is_left_alone(tx):
    """A norm of a matrix is a sum over shards, which moves one number."""
    params, zero = draws(0), small.zero()
    assert moves(zero.whole_matrices(tx).update, params, tx.init(params), params) == 0


def test_what_is_between_two_products_stays_with_them():
    """Each matrix has two constraints before its products, and two after them."""

    def polynomial(x):
        square = x.T @ x
        return (x @ (3 * square + jnp.maximum(square, 0) @ square)) / 2

    def update(grads, state, params=None):
        updates = jax.tree.map(lambda g, p: -0.1 * polynomial(g / 2) + 0.1 * p, grads, params)
        return updates, state

    tx = small.zero().whole_matrices(optax.GradientTransformation(lambda params: (), update))
    ones = {"a": jnp.ones((16, 8)), "b": jnp.ones((16, 8))}
    assert moves(tx.update, ones, (), ones) == 4


def test_a_branch_is_left_alone_and_may_hold_moves():
    params, zero = draws(0), small.zero()
    outside = zero.whole_matrices(optax.MultiSteps(of_tree(), 2).gradient_transformation())
    inside = optax.MultiSteps(zero.whole_matrices(of_tree()), 2).gradient_transformation()
    state = inside.init(params)
    assert "sharding_constraint" not in str(jax.make_jaxpr(outside.update)(params, state, params))
    assert "sharding_constraint" in str(jax.make_jaxpr(inside.update)(params, state, params))


@pytest.mark.slow
def test_multi_steps_equal_one_device():
    zero = small.zero()
    ours = steps(optax.MultiSteps(zero.whole_matrices(of_tree()), 2), zero, 3)
    theirs = steps(optax.MultiSteps(of_tree(), 2), count=3)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_one_device_and_stage_0_get_the_transform_itself():
    tx = optax.with_extra_args_support(of_tree())
    assert small.zero(1).whole_matrices(tx) is small.zero(stage=0).whole_matrices(tx) is tx


def test_matrices_that_are_multiplied_by_different_constants_are_not_alike():
    """The text of a program does not show the constants of the functions that it calls."""

    def times(value):
        def body(x, _):
            return jax.jit(lambda x: x @ jnp.asarray(value))(x), None

        return lambda x: jax.lax.scan(body, x, None, length=2)[0]

    def update(grads, state, params=None):
        return {"a": times(2 * np.eye(4, dtype=np.float32))(grads["a"]),
                "b": times(3 * np.eye(4, dtype=np.float32))(grads["b"])}, state

    tx = optax.GradientTransformation(lambda params: (), update)
    ones = {"a": jnp.ones((8, 4)), "b": jnp.ones((8, 4))}
    ours, _ = jax.jit(small.zero().whole_matrices(tx).update)(ones, ())
    np.testing.assert_array_equal(ours["a"][0, 0], 4)
    np.testing.assert_array_equal(ours["b"][0, 0], 9)


def matrices_and_more():
    params = draws(0)
    return {"w": params["alike_0"], "v": params["alike_1"], "frozen": params["alike_2"],
            "b": jnp.zeros(16)}


def loss(params, x):
    y = jnp.tanh(x @ params["w"]) @ params["v"].T + params["b"][None]
    return zj.Loss(((y @ params["frozen"]) ** 2).sum(), x.shape[0])


def batches(count):
    return [np.random.default_rng(seed).normal(size=(32, 16)).astype(np.float32)
            for seed in range(count)]


MODEL = zoo.Model(matrices_and_more, loss, None, lambda m: (m, None), lambda p, _: p)


def test_with_microbatches_clipping_frozen_parameters_and_a_skipped_step():
    tx, zero = optax.contrib.muon(0.02, adam_eps_root=1e-6, weight_decay=0.1), small.zero()
    theirs, _, _ = oracle.train(MODEL, tx, batches(3), accumulate=2, clip_norm=0.5,
                                trained=lambda path: path != "frozen")
    tx = zero.whole_matrices(tx)
    step = zero.train_step(loss, tx, accumulate=2, clip_norm=0.5, compiler_options=oracle.QUICK)
    state = zero.init(matrices_and_more, tx, trainable="[wvb]")
    assert {x.sharding.spec for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 24)} == {
        state.params["w"].sharding.spec} == {jax.P(None, "data")}
    for batch in [*batches(2), np.full((32, 16), np.inf, np.float32), batches(3)[2]]:
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"]) == np.isfinite(batch).all()
    assert_equal(state, theirs)


@pytest.mark.slow
def test_a_checkpoint_of_the_transform_alone_continues_on_another_mesh(tmp_path):
    tx = optax.contrib.muon(0.02, adam_eps_root=1e-6)
    theirs, _, _ = oracle.train(MODEL, tx, batches(4))
    zero, other = small.zero(4, stage=2), small.zero(8)
    with zj.Checkpointer(tmp_path, zero=zero) as checkpoints:
        checkpoints.save(trained(zero, MODEL, tx, batches(2)), force=True)
    whole = zero.whole_matrices(tx)
    with zj.Checkpointer(tmp_path, zero=zero) as checkpoints:
        state = checkpoints.restore_latest(zero.abstract(matrices_and_more, whole)).state
    state, _ = zero.train_step(loss, whole)(state, batches(3)[2])
    state, _ = other.train_step(loss, other.whole_matrices(tx))(
        zero.move(state, other), batches(4)[3])
    assert_equal(state, theirs)


@pytest.mark.slow
def test_padded_matrices_equal_one_device():
    """More inputs than outputs: Muon's scale is 1, with and without padding."""
    def init():
        return {"w": draws(0)["even"][0, :15, :7], "v": draws(1)["even"][0, :15, :7]}

    def loss(params, x):
        return zj.Loss((jnp.tanh(x @ params["w"]) @ params["v"].T).sum(), x.shape[0])

    model = zoo.Model(init, loss, None, lambda m: (m, None), lambda p, _: p)
    tx, zero = optax.contrib.muon(0.02), small.zero(uneven="pad")
    data = [x[:, :15] for x in batches(3)]
    theirs, _, _ = oracle.train(model, tx, data)
    state = trained(zero, model, zero.whole_matrices(tx), data)
    assert isinstance(state.params["w"], zj.Padded)
    assert_equal(state, theirs)


@pytest.mark.slow
def test_an_nnx_optimizer_equals_one_device():
    model = zoo.MODELS["nnx"]()
    batch = model.batch(16, 0)

    def run(tx, zero=None):
        def create():
            module = model.init()
            return module, nnx.Optimizer(module, tx, wrt=nnx.Param)

        graphdef, _ = nnx.split(nnx.eval_shape(create))

        def step(state, batch):
            module, optimizer = nnx.merge(graphdef, state)
            grad = zero.value_and_grad if zero else nnx.value_and_grad
            _, grads = grad(lambda m, b: zoo.mean_tokens(m(b), b))(module, batch)
            optimizer.update(module, grads)
            return nnx.state((module, optimizer))

        def made():
            return nnx.state(create())

        state = zero.create(made) if zero else made()
        return (zero.jit(step) if zero else jax.jit(step))(state, batch)

    zero = small.zero()
    ours, theirs = run(zero.whole_matrices(muon()), zero), run(muon())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1e-3, np.abs(b).max()))
