"""Islands: between averages each is a run of its own, and averages are those of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import zerojax as zj

TX = optax.adam(0.05)
DILOCO = optax.sgd(0.7, momentum=0.9, nesterov=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 16, 8)).astype(np.float32)  # of step, example, feature


def zero(islands=2, n=8, stage=3, **settings):
    mesh = zj.make_mesh(islands=islands, devices=jax.devices()[:n])
    return zj.Zero(mesh, stage, min_shard=1, **settings)


def init():
    key = jax.random.key(1)
    return {"w": jax.random.normal(key, (8, 16)), "b": jnp.zeros(5)}


def loss(params, x):
    y = jnp.tanh(x @ params["w"])
    return zj.Loss(((y.sum(1) - 1) ** 2).sum() + x.shape[0] * (params["b"] - 1).sum() ** 2,
                   x.shape[0])


def noisy(params, x, rng):
    return loss(params, x + jax.random.normal(rng, x.shape))


def run(islands, state, step, numbers):
    for i in numbers:
        state, metrics = step(state, X[i])
    return state, metrics


def assert_close(ours, theirs, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


def assert_equal(ours, theirs):
    def array(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                          else x)

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(array(a), array(b)), ours, theirs)


def alone(i, of, loss_fn, steps, tx=TX, before=None, **options):
    """Returns the state and the metrics of island `i` in a run of its own, on one device."""
    own = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]), 0)
    state = own.init(init, tx) if before is None else before
    state = state.replace(rng=jax.random.fold_in(jax.random.key(0), i))
    step = own.train_step(loss_fn, tx, **options)
    for n in steps:
        state, metrics = step(state, np.split(X[n], of)[i])
    return state, metrics


@pytest.mark.parametrize("stage", quick.some(range(4), (3).__eq__))
def test_between_averages_each_island_is_a_run_of_its_own(stage):
    islands = zero(stage=stage).islands(2, every=10)
    step = islands.train_step(loss, TX, accumulate=2)
    state, metrics = run(islands, islands.init(init, TX), step, range(3))
    spec = state.islands.params["w"].sharding.spec
    assert spec == (jax.P("island", None, "data") if stage else jax.P("island"))
    for i in range(2):
        own, own_metrics = alone(i, 2, loss, range(3), accumulate=2)
        mine = jax.tree.map(lambda x, i=i: x[i], (state.islands.params, state.islands.opt_state))
        assert_close(mine, (own.params, own.opt_state))
        assert_close({k: x[i] for k, x in metrics.items()}, own_metrics, atol=2e-4)
    assert np.abs(np.diff(state.islands.params["w"], axis=0)).max() > 0.01
