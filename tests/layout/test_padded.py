"""Dimensions that do not divide: kept with rows of zeros, and logical wherever a user looks."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo
from flax import nnx
from jax.sharding import PartitionSpec as P

import zerojax as zj

TX = optax.adam(1e-2, eps=1e-3)  # a gradient near 0 is no step of full size
X = np.random.default_rng(0).normal(size=(60, 17)).astype(np.float32)
SHAPES = {"b": (7,), "h": (5, 3), "n": (20, 4), "w": (17, 13)}


def _init():
    w = jax.random.normal(jax.random.key(0), (17, 13))
    return {"w": w, "b": jnp.arange(7.0), "h": jnp.ones((5, 3)) / 4, "n": jnp.ones((20, 4))}


def _outputs(p, x):
    return jnp.tanh(x @ p["w"])[:, :7] + jnp.asarray(p["b"])[None] + p["h"].sum() + p["n"].sum()


def _mean(p, x):
    return jnp.square(_outputs(p, x)).mean()


def _sum(p, x):
    return zj.Loss(jnp.square(_outputs(p, x)).sum(), 7 * x.shape[0])


FORMS = {"one loss": _mean, "per device": _sum}


def _zero(devices, stage=3, uneven="pad", **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:devices]), stage, min_shard=1, uneven=uneven, **settings)


def _plain(state):
    return {path: np.asarray(x) for path, x in state.params.items()}


def _kept(state):
    return {path: x.kept.shape if isinstance(x, zj.Padded) else x.shape for path, x in state.params.items()}


def _trained(zero, loss=_sum, steps=2, **options):
    state, step = zero.init(_init, TX), zero.train_step(loss, TX, compiler_options=oracle.QUICK, **options)
    for _ in range(steps):
        state, metrics = step(state, X)
    return state, metrics


@pytest.fixture(scope="module")
def theirs():
    return _trained(zj.Zero(zj.make_mesh(devices=jax.devices()[:1])), clip_norm=0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", range(4))
def test_steps_equal_one_device(stage, form, theirs):
    zero = _zero(6, stage)
    state, metrics = _trained(zero, FORMS[form], accumulate=1 + stage % 2 * 4, clip_norm=0.5)
    for path, x in _plain(theirs[0]).items():
        np.testing.assert_allclose(state.params[path], x, rtol=0, atol=1e-5)
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose(metrics[name], theirs[1][name], rtol=1e-5)
    np.testing.assert_allclose(zero.eval_step(_sum)(state, X)["loss"], _mean(_plain(state), X), rtol=1e-5)


def test_state_at_rest_is_sharded_to_within_a_row():
    state = _zero(6).init(_init, TX)
    assert _kept(state) == {"b": (12,), "h": (6, 3), "n": (24, 4), "w": (18, 13)}
    assert {path: x.shape for path, x in state.params.items()} == SHAPES
    for x in jax.tree.leaves((state.params, state.opt_state[0].mu)):
        assert x.sharding.shard_shape(x.shape)[0] * 6 == x.shape[0]


def test_what_is_padded_looks_as_its_logical_array():
    zero = _zero(6)
    state = zero.init(_init, TX)
    w, born = state.params["w"], np.asarray(_init()["w"])
    assert (w.shape, w.dtype, w.ndim, w.size) == ((17, 13), np.float32, 2, 17 * 13)
    np.testing.assert_array_equal(w, born)
    np.testing.assert_array_equal(w[3], born[3])
    np.testing.assert_allclose(2 * w - 1, 2 * born - 1)
    np.testing.assert_allclose(jnp.square(w).sum(), np.square(born).sum(), rtol=1e-6)
    assert repr(w) == "Padded(float32[17, 13], kept as [18, 13])"
    assert {path: x.shape for path, x in zj.logical(state).params.items()} == SHAPES
    rows = {row.path: row for row in zero.layout(state).rows}
    assert rows["params/w"].shape == (17, 13) and rows["params/w"].spec == P("data") + P(None)
    assert rows["params/w"].bytes == rows["opt_state/0/mu/w"].bytes == 18 * 13 * 4 / 6


def test_abstract_states_are_padded_alike():
    zero = _zero(6)
    state, shapes = zero.init(_init, TX), zero.abstract(_init, TX)
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, shape.sharding)


PAIRS = [((6, "pad"), (7, "pad")), ((6, "pad"), (6, None)), ((6, None), (6, "pad")), ((6, "pad"), (1, None)),
         ((8, "pad"), (6, "pad"))]


@pytest.mark.parametrize("ours, other", PAIRS)
def test_checkpoints_are_logical(ours, other, tmp_path):
    zero = _zero(ours[0], uneven=ours[1])
    state = zero.init(_init, TX)
    with zj.Checkpointer(tmp_path, zero=zero) as saved:
        saved.save(state)
        entries = saved.verify(0).leaves if saved.wait() is None else {}
        assert {p.removeprefix("params/"): e.shape for p, e in entries.items() if p.startswith("params")} == SHAPES
        there = _zero(other[0], uneven=other[1])
        back = saved.restore(0, there.abstract(_init, TX)).state
    with zj.Checkpointer(tmp_path / "again", zero=there) as again:
        again.save(back)
        again.wait()
        assert {p: e.digest for p, e in again.verify(0).leaves.items()} == {p: e.digest for p, e in entries.items()}
    for path, x in _init().items():
        np.testing.assert_array_equal(back.params[path], x)
    fresh = there.init(_init, TX)
    assert _kept(back) == _kept(fresh)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(fresh.params), strict=True):
        np.testing.assert_array_equal(a, b)  # rows of zeros too


@pytest.mark.parametrize("ours, other", PAIRS)
def test_states_move(ours, other):
    zero, there = _zero(ours[0], uneven=ours[1]), _zero(other[0], uneven=other[1])
    state, fresh = zero.move(zero.init(_init, TX), there), there.init(_init, TX)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(fresh.params), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding


@pytest.mark.parametrize("ours, other", [((6, "pad"), (7, "pad")), ((6, None), (7, "pad"))])
def test_exports_are_logical(ours, other, tmp_path):
    zero = _zero(ours[0], uneven=ours[1])
    state, _ = _trained(zero)
    with zj.Checkpointer(tmp_path, zero=zero) as saved:
        saved.save(state)
    zj.export_safetensors(tmp_path, tmp_path / "model.safetensors")
    from safetensors.numpy import load_file
    assert {name: x.shape for name, x in load_file(tmp_path / "model.safetensors").items()} == SHAPES
    back = zj.load_safetensors(tmp_path / "model.safetensors", _zero(other[0], uneven=other[1]).init(_init, TX))
    for path, x in _plain(state).items():
        np.testing.assert_array_equal(back.params[path], x)


def test_stages_share_a_padded_state(theirs):
    state = _zero(6).init(_init, TX)
    for stage in (3, 0):
        state, _ = _zero(6, stage).train_step(_sum, TX, clip_norm=0.5)(state, X)
    for path, x in _plain(theirs[0]).items():
        np.testing.assert_allclose(state.params[path], x, rtol=0, atol=1e-5)


def test_a_state_padded_for_other_devices_is_told():
    state = jax.device_get(_zero(6).init(_init, TX))
    with pytest.raises(zj.LayoutError, match=r"an array of shape .* is kept as .*, for another number of devices than the 7"):
        _zero(7).layout(state)


def test_without_padding_what_stays_whole_is_told():
    with pytest.warns(UserWarning, match=r"zero.init: 100% of the state's .* as params/w: no free dimension of \(17, 13\)"):
        _zero(6, uneven=None).init(_init, TX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _zero(6).init(_init, TX)
        _zero(6, 0, uneven=None).init(_init, TX)
        zj.Zero(zj.make_mesh(devices=jax.devices()[:6])).init(_init, TX)  # all of it is small


@pytest.mark.parametrize("name", zoo.OPTIMIZERS)
def test_optimizers_equal_one_device_or_are_refused_by_name(name):
    model, tx, zero = zoo.MODELS["mlp"](), zoo.OPTIMIZERS[name](), _zero(6)
    refused = {"adafactor": "FactoredState", "odd": "without state"}
    if name in refused:
        with pytest.raises(zj.PolicyError, match=rf"the optimizer \(.*{refused[name]}.*\) minds rows of zeros"):
            zero.init(model.init, tx)
        return
    batches = [model.batch(12, seed) for seed in range(3)]
    theirs, _, losses = oracle.train(model, tx, batches)
    state, step = zero.init(model.init, tx), zero.train_step(model.loss, tx, compiler_options=oracle.QUICK)
    for batch, loss in zip(batches, losses, strict=True):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    plain = jax.tree.leaves(zj.logical(state.params))
    for ours, their in zip(plain, jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, their, rtol=0, atol=1e-5 * np.abs(their).max())


def test_a_scale_by_the_shape_is_refused():
    """Muon's is the square root of outputs over inputs, where there are more outputs."""
    for shape, minds in (((8, 20), True), ((20, 8), False)):
        init = lambda shape=shape: {"w": jnp.ones(shape)}
        if not minds:
            assert _zero(6).init(init, optax.contrib.muon(0.1)).params["w"].shape == shape
            continue
        with pytest.raises(zj.PolicyError, match=r"MuonState.* params/w is another after two updates"):
            _zero(6).init(init, optax.contrib.muon(0.1))


def test_a_transform_that_adds_noise_is_refused():
    with pytest.raises(zj.PolicyError, match=r"AddNoiseState.* params/b is another after two updates of tiny arrays"):
        _zero(6).init(_init, optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(17)(x)), None


SCANNED = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
MODELS = {
    "scanned": (lambda: SCANNED.init(jax.random.key(0), X, None), lambda v, x: SCANNED.apply(v, x, None)[0]),
    "nnx": (lambda: nnx.Linear(17, 13, rngs=nnx.Rngs(0)), lambda m, x: m(x)),
    "frozen": (lambda: {"a": jnp.eye(17), "lora": jnp.ones((17, 17)) / 9}, lambda p, x: x @ p["a"] @ p["lora"]),
    "read twice": (lambda: {"w": jnp.eye(17)}, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["w"][:1]),
    "in a loop": (lambda: {"w": jnp.eye(17)}, lambda p, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, 3)[0]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_wherever_a_padded_parameter_is_read(name, form):
    init, apply = MODELS[name]
    mean, total = lambda m, x: jnp.square(apply(m, x) - 1).mean(), lambda m, x: zj.Loss(jnp.square(apply(m, x) - 1).sum(), x.size)
    results = []
    for zero in (_zero(6), zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))):
        tx, trainable = optax.sgd(0.1), "lora" if name == "frozen" else None
        state = zero.init(init, tx, trainable=trainable)
        step = zero.train_step(mean if form == "one loss" else total, tx, compiler_options=oracle.QUICK)
        for _ in range(2):
            state, metrics = step(state, X)
        results.append((jax.tree.leaves(zj.logical(state.params)), metrics["loss"]))
    (ours, loss), (theirs, expected) = results
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_transform_that_minds_is_refused_by_the_step_too():
    """One without state, behind an init with another, or behind a move."""
    minds = optax.stateless(lambda u, p: jax.tree.map(lambda g: g - g.mean(0, keepdims=True), u))
    zero = _zero(6)
    moved = _zero(6, uneven=None).move(_zero(6, uneven=None).init(_init, minds), zero)
    for state in (zero.init(_init, optax.sgd(0.1)), moved):
        with pytest.raises(zj.PolicyError, match="minds rows of zeros"):
            zero.train_step(_sum, minds)(state, X)


@pytest.mark.parametrize("make", [lambda: optax.adagrad(0.1), lambda: optax.novograd(0.1), lambda: optax.lamb(0.1)])
def test_transforms_that_do_not_mind_are_taken(make):
    zero, one = _zero(6), zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))
    ends = []
    for z in (zero, one):
        state, step = z.init(_init, make()), z.train_step(_sum, make(), compiler_options=oracle.QUICK)
        for _ in range(2):
            state, _ = step(state, X)
        ends.append(jax.tree.leaves(zj.logical(state.params)))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_loop_of_ones_own_over_padded_parameters():
    zero = _zero(6)
    state = zero.init(_init, TX)
    value, grads = zero.jit(lambda s, x: zero.value_and_grad(_sum)(s.params, x), donate=False)(state, X)
    theirs = jax.grad(_mean)(_init(), X)
    np.testing.assert_allclose(value, _mean(_init(), X), rtol=1e-6)
    for path, g in theirs.items():
        np.testing.assert_allclose(grads[path], g, rtol=0, atol=1e-6 * np.abs(g).max())
    total = zero.jit(lambda s, x: zero.gathered(_mean)(s.params, x), donate=False)(state, X)
    np.testing.assert_allclose(total, value, rtol=1e-6)


def test_a_padded_array_is_iterated_and_has_an_arrays_methods():
    b = _zero(6).init(_init, TX).params["b"]
    assert [float(x) for x in b] == list(range(7)) and len(b) == 7 and 3.0 in b
    assert float(b.max()) == 6 and b.astype("int32").tolist() == list(range(7)) and b.reshape(7, 1).T.shape == (1, 7)


def test_parameters_on_other_devices_are_taken():
    params = jax.device_put(_init(), jax.devices()[9])
    state = _zero(6).init(params, TX)
    np.testing.assert_array_equal(state.params["w"], params["w"])


def test_a_rule_at_stage_0_needs_no_padding():
    with pytest.raises(zj.LayoutError, match="dimension 1 of 13 does not divide by 6"):
        _zero(6, 0, rules={"w": P(None, "data")}).init(_init, TX)
