"""Islands: between averages each is a run of its own, and averages are those of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import zerojax as zj
from zerojax.train import island_step

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


def run(state, step, numbers):
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
    state, metrics = run(islands.init(init, TX), step, range(3))
    spec = state.islands.params["w"].sharding.spec
    assert spec == (jax.P("island", None, "data") if stage else jax.P("island"))
    for i in range(2):
        own, own_metrics = alone(i, 2, loss, range(3), accumulate=2)
        mine = jax.tree.map(lambda x, i=i: x[i], (state.islands.params, state.islands.opt_state))
        assert_close(mine, (own.params, own.opt_state))
        assert_close({k: x[i] for k, x in metrics.items()}, own_metrics, atol=2e-4)
    assert np.abs(np.diff(state.islands.params["w"], axis=0)).max() > 0.01


@pytest.mark.parametrize("stage", quick.some((3, 0), (3).__eq__))
def test_an_average_in_every_step_of_sgd_is_data_parallel_training(stage):
    tx, policy = optax.sgd(0.1), zero(stage=stage)
    islands, synchronous = policy.islands(2, every=1), zero(stage=stage, replica_axis="island")
    state, _ = run(islands.init(init, tx), islands.train_step(loss, tx), range(4))
    theirs, _ = run(synchronous.init(init, tx), synchronous.train_step(loss, tx), range(4))
    assert_close(state.islands.params, jax.tree.map(lambda x: np.stack([x, x]), theirs.params))
    average = islands.average(state)
    assert_close(average.params, theirs.params)
    assert average.params["w"].sharding == theirs.params["w"].sharding


def line(params, x):
    return zj.Loss(((x @ params["w"] - 1) ** 2).sum(), x.shape[0])


def diloco(rounds, every, lr=0.7, momentum=0.9):
    """Returns the parameters after DiLoCo of `line` over two islands, in numpy.

    The inner optimizer is SGD with momentum; the outer one is SGD with Nesterov momentum.
    """
    w = np.asarray(init()["w"])
    inner, outer = [np.zeros_like(w), np.zeros_like(w)], np.zeros_like(w)
    for r in range(rounds):
        islands = [w, w]
        for n in range(r * every, (r + 1) * every):
            for i, x in enumerate(np.split(X[n], 2)):
                inner[i] = 0.9 * inner[i] + 2 * x.T @ (x @ islands[i] - 1) / len(x)
                islands[i] = islands[i] - 0.05 * inner[i]
        move = w - (islands[0] + islands[1]) / 2
        outer = momentum * outer + move
        w = w - lr * (move + momentum * outer)
    return w, inner


def test_an_outer_optimizer_takes_the_mean_move_as_its_gradient():
    islands, tx = zero().islands(2, every=2, outer=DILOCO), optax.sgd(0.05, momentum=0.9)
    state, step = islands.init(init, tx), islands.train_step(line, tx)
    state, _ = run(state, step, range(6))
    w, inner = diloco(3, 2)
    assert_close(islands.average(state).params["w"], w)
    assert_close(state.outer.params["w"], w)
    assert_close(state.islands.params["w"], np.stack([w, w]))
    # each island keeps its own optimizer state
    assert_close(state.islands.opt_state[0].trace["w"], np.stack(inner), atol=1e-5)


@pytest.mark.slow
def test_without_an_outer_optimizer_parameters_become_their_mean():
    islands = zero(islands=4).islands(4, every=2)
    state, _ = run(islands.init(init, TX), islands.train_step(loss, TX), range(2))
    parts = [alone(i, 4, loss, range(2))[0].params for i in range(4)]
    mean = jax.tree.map(lambda *xs: np.mean(xs, 0), *parts)
    assert_close(state.islands.params, jax.tree.map(lambda x: np.stack([x] * 4), mean))


def test_two_programs_and_one_wait_for_the_device(lowerings, monkeypatch):
    islands = zero().islands(2, every=2)
    state, step = islands.init(init, TX), islands.train_step(loss, TX)
    reads, averages, average = [], [], step._average
    monkeypatch.setattr(island_step, "int", lambda x: reads.append(type(x)) or int(x),
                        raising=False)
    monkeypatch.setattr(step, "_average", lambda s: averages.append(s.step) or average(s))
    state, _ = run(state, step, range(2))
    lowerings.clear()
    state, _ = run(state, step, range(2, 7))
    assert reads.count(type(state.step)) == 1 and len(averages) == 3 and not lowerings


@pytest.mark.parametrize("outer", [DILOCO, pytest.param(None, marks=pytest.mark.slow)])
def test_a_restored_run_ends_the_round_and_continues_bit_for_bit(outer, tmp_path):
    islands = zero().islands(2, every=3, outer=outer)
    step = islands.train_step(noisy, TX)
    state, _ = run(islands.init(init, TX), step, range(4))
    with zj.Checkpointer(tmp_path, zero=islands) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore_latest(islands.abstract(init, TX))
    state, metrics = run(state, step, range(4, 9))
    restored, again = run(found.state, islands.train_step(noisy, TX), range(4, 9))
    assert found.step == 4
    assert_equal((restored, again), (state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("outer", [DILOCO, None])
def test_move_to_another_number_of_islands(outer):
    old, new = zero().islands(2, every=2, outer=outer), zero(4, stage=1).islands(
        4, every=3, outer=outer)
    state, _ = run(old.init(init, TX), old.train_step(loss, TX), range(3))  # within a round
    average, before = old.average(state), jax.tree.map(np.asarray, state.outer)
    moved = old.move(state, new)
    jax.tree.map(lambda x, mean: assert_close(x, np.stack([np.asarray(mean)] * 4)),
                 moved.islands.params, average.params)
    assert_close(average.params, jax.tree.map(lambda x: np.mean(x, 0), state.islands.params))
    assert_close(average.opt_state[0].mu, jax.tree.map(lambda x: np.mean(x, 0),
                                                       state.islands.opt_state[0].mu))
    assert int(average.opt_state[0].count) == 3 and int(moved.step) == 3
    assert_equal(jax.tree.map(np.asarray, moved.outer), before)
    step = new.train_step(loss, TX)
    for _ in range(2):
        moved, _ = step(moved, X[0])
    wanted = jax.tree.map(lambda x: x.sharding, new.abstract(init, TX))
    assert jax.tree.map(lambda x: x.sharding, moved) == wanted


@pytest.mark.slow
def test_move_takes_up_and_drops_an_outer_optimizer_but_never_changes_it():
    plain, outer = zero().islands(2, every=2), zero().islands(2, every=2, outer=DILOCO)
    state, _ = run(plain.init(init, TX), plain.train_step(loss, TX), range(1))
    moved = plain.move(state, outer)
    assert_close(moved.outer.params, plain.average(state).params)
    assert outer.move(moved, plain).outer is None
    with pytest.raises(zj.PolicyError, match="another outer optimizer, which keeps other state"):
        outer.move(moved, zero().islands(2, every=2, outer=optax.adam(0.1)))
    with pytest.raises(zj.ModelError, match="another outer optimizer than the islands of this"):
        outer.train_step(loss, TX)(state, X[0])


@pytest.mark.slow
def test_islands_can_follow_synchronous_training():
    policy = zero()
    islands, one = policy.islands(2, every=2), policy.init(init, TX)
    one, _ = run(one, policy.train_step(loss, TX), range(1))
    params = jax.tree.map(np.asarray, one.params)
    state = islands.start(one)
    assert int(state.step) == 1
    assert_close(state.islands.params, jax.tree.map(lambda x: np.stack([x, x]), params), atol=0)
    state, _ = islands.train_step(loss, TX)(state, X[1])  # ends a round
    assert np.abs(np.diff(state.islands.params["w"], axis=0)).max() == 0


def test_an_island_with_a_non_finite_step_stays_as_it_was():
    islands = zero().islands(2, every=10)
    state, step = islands.init(init, TX), islands.train_step(loss, TX, max_skipped=2)
    state, _ = step(state, X[0])
    before = np.asarray(state.islands.params["w"])
    bad = X[1].copy()
    bad[12, 3] = np.nan  # one example of the second island
    state, metrics = step(state, bad)
    assert metrics["skipped"].tolist() == [0, 1] and state.skipped.tolist() == [0, 1]
    moved = np.abs(np.asarray(state.islands.params["w"]) - before).max((1, 2))
    assert moved[0] > 0.01 and moved[1] == 0
    state, metrics = step(state, bad)
    with pytest.warns(UserWarning, match="the loss was nan"):
        state, metrics = step(state, bad)
    with pytest.raises(zj.NonFiniteError, match=r"2 consecutive steps were skipped"):
        for _ in range(2):
            state, metrics = step(state, bad)
