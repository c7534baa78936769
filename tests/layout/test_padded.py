"""Padding of indivisible dimensions: sharded at rest, and invisible to users."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import quick
import zoo
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import zerojax as zj

TX = optax.adam(1e-2, eps=1e-3)  # eps keeps a gradient near 0 from becoming a full-size step
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
    mesh = zj.make_mesh(devices=jax.devices()[:devices])
    return zj.Zero(mesh, stage, min_shard=1, uneven=uneven, **settings)


def _one_device():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))


def _plain(state):
    return {path: np.asarray(x) for path, x in state.params.items()}


def _kept(state):
    return {path: x.kept.shape if isinstance(x, zj.Padded) else x.shape
            for path, x in state.params.items()}


def _shapes(state):
    return {path: x.shape for path, x in state.params.items()}


def _trained(zero, loss=_sum, steps=2, **options):
    step = zero.train_step(loss, TX, compiler_options=oracle.QUICK, **options)
    state = zero.init(_init, TX)
    for _ in range(steps):
        state, metrics = step(state, X)
    return state, metrics


@pytest.fixture(scope="module")
def theirs():
    """The state and metrics after training on one device."""
    return _trained(_one_device(), clip_norm=0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", range(4))
def test_steps_equal_one_device(stage, form, theirs):
    zero = _zero(6, stage)
    state, metrics = _trained(zero, FORMS[form], accumulate=1 + stage % 2 * 4, clip_norm=0.5)
    for path, x in _plain(theirs[0]).items():
        np.testing.assert_allclose(state.params[path], x, rtol=0, atol=1e-5)
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose(metrics[name], theirs[1][name], rtol=1e-5)
    evaluated = zero.eval_step(_sum)(state, X)["loss"]
    np.testing.assert_allclose(evaluated, _mean(_plain(state), X), rtol=1e-5)


def test_state_at_rest_is_sharded_to_within_a_row():
    state = _zero(6).init(_init, TX)
    assert _kept(state) == {"b": (12,), "h": (6, 3), "n": (24, 4), "w": (18, 13)}
    assert _shapes(state) == SHAPES
    for x in jax.tree.leaves((state.params, state.opt_state[0].mu)):
        assert x.sharding.shard_shape(x.shape)[0] * 6 == x.shape[0]


def test_a_padded_array_looks_like_its_logical_array():
    zero = _zero(6)
    state = zero.init(_init, TX)
    w, born = state.params["w"], np.asarray(_init()["w"])
    assert (w.shape, w.dtype, w.ndim, w.size) == ((17, 13), np.float32, 2, 17 * 13)
    np.testing.assert_array_equal(w, born)
    np.testing.assert_array_equal(w[3], born[3])
    np.testing.assert_allclose(2 * w - 1, 2 * born - 1)
    np.testing.assert_allclose(jnp.square(w).sum(), np.square(born).sum(), rtol=1e-6)
    assert repr(w) == "Padded(float32[17, 13], kept as [18, 13])"
    assert _shapes(zj.logical(state)) == SHAPES
    rows = {row.path: row for row in zero.layout(state).rows}
    assert rows["params/w"].shape == (17, 13) and rows["params/w"].spec == P("data") + P(None)
    assert rows["params/w"].bytes == rows["opt_state/0/mu/w"].bytes == 18 * 13 * 4 / 6


def test_abstract_states_are_padded_alike():
    zero = _zero(6)
    state, shapes = zero.init(_init, TX), zero.abstract(_init, TX)
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, shape.sharding)


def _digests(entries):
    return {path: entry.digest for path, entry in entries.items()}


PAIRS = [((6, "pad"), (7, "pad")), ((6, "pad"), (6, None)), ((6, None), (6, "pad")),
         ((6, "pad"), (1, None)), ((8, "pad"), (6, "pad"))]


@pytest.mark.parametrize("ours, other", PAIRS)
def test_checkpoints_are_logical(ours, other, tmp_path):
    zero = _zero(ours[0], uneven=ours[1])
    state = zero.init(_init, TX)
    with zj.Checkpointer(tmp_path, zero=zero) as saved:
        saved.save(state)
        saved.wait()
        entries = saved.verify(0).leaves
        shapes = {path.removeprefix("params/"): entry.shape
                  for path, entry in entries.items() if path.startswith("params")}
        assert shapes == SHAPES
        there = _zero(other[0], uneven=other[1])
        back = saved.restore(0, there.abstract(_init, TX)).state
    with zj.Checkpointer(tmp_path / "again", zero=there) as again:
        again.save(back)
        again.wait()
        assert _digests(again.verify(0).leaves) == _digests(entries)
    for path, x in _init().items():
        np.testing.assert_array_equal(back.params[path], x)
    fresh = there.init(_init, TX)
    assert _kept(back) == _kept(fresh)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(fresh.params), strict=True):
        np.testing.assert_array_equal(a, b)  # with their rows of zeros


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
    zero, file = _zero(ours[0], uneven=ours[1]), tmp_path / "model.safetensors"
    state, _ = _trained(zero)
    with zj.Checkpointer(tmp_path, zero=zero) as saved:
        saved.save(state)
    zj.export_safetensors(tmp_path, file)
    assert {name: x.shape for name, x in load_file(file).items()} == SHAPES
    back = zj.load_safetensors(file, _zero(other[0], uneven=other[1]).init(_init, TX))
    for path, x in _plain(state).items():
        np.testing.assert_array_equal(back.params[path], x)


def test_stages_share_a_padded_state(theirs):
    state = _zero(6).init(_init, TX)
    for stage in (3, 0):
        state, _ = _zero(6, stage).train_step(_sum, TX, clip_norm=0.5)(state, X)
    for path, x in _plain(theirs[0]).items():
        np.testing.assert_allclose(state.params[path], x, rtol=0, atol=1e-5)


def test_a_state_padded_for_other_devices_is_an_error():
    state = jax.device_get(_zero(6).init(_init, TX))
    text = "an array of shape .* is padded to .*, for a number of devices other than the 7"
    with pytest.raises(zj.LayoutError, match=text):
        _zero(7).layout(state)


def test_without_padding_the_parameters_that_stay_whole_are_named():
    text = r"zero.init: 100% of the state's .* such as params/w: no free dimension of \(17, 13\)"
    with pytest.warns(UserWarning, match=text):
        _zero(6, uneven=None).init(_init, TX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _zero(6).init(_init, TX)
        _zero(6, 0, uneven=None).init(_init, TX)
        zj.Zero(zj.make_mesh(devices=jax.devices()[:6])).init(_init, TX)  # all leaves are small


@pytest.mark.parametrize("name", quick.some(
    zoo.OPTIMIZERS, {"adafactor", "odd", "adamw"}.__contains__))
def test_optimizers_equal_one_device_or_are_refused_by_name(name):
    model, tx, zero = zoo.MODELS["mlp"](), zoo.OPTIMIZERS[name](), _zero(6)
    refused = {"adafactor": "FactoredState", "odd": "without state"}
    if name in refused:
        text = rf"the optimizer \(.*{refused[name]}.*\) is affected by rows of zeros"
        with pytest.raises(zj.PolicyError, match=text):
            zero.init(model.init, tx)
        return
    batches = [model.batch(12, seed) for seed in range(3)]
    theirs, _, losses = oracle.train(model, tx, batches)
    step = zero.train_step(model.loss, tx, compiler_options=oracle.QUICK)
    state = zero.init(model.init, tx)
    for batch, loss in zip(batches, losses, strict=True):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    plain = jax.tree.leaves(zj.logical(state.params))
    for ours, their in zip(plain, jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, their, rtol=0, atol=1e-5 * np.abs(their).max())


def test_a_scale_by_the_shape_is_refused():
    """Muon scales by the square root of outputs over inputs, if there are more outputs."""
    muon = optax.contrib.muon(0.1)
    assert _zero(6).init(lambda: {"w": jnp.ones((20, 8))}, muon).params["w"].shape == (20, 8)
    text = r"MuonState.* params/w differs after two updates"
    with pytest.raises(zj.PolicyError, match=text):
        _zero(6).init(lambda: {"w": jnp.ones((8, 20))}, muon)


def test_a_transform_that_adds_noise_is_refused():
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1))
    text = r"AddNoiseState.* params/b differs after two updates of tiny arrays"
    with pytest.raises(zj.PolicyError, match=text):
        _zero(6).init(_init, noisy)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(17)(x)), None


SCANNED = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
                  length=3)()


def _loop(p, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, 3)[0]


MODELS = {
    "scanned": (lambda: SCANNED.init(jax.random.key(0), X, None),
                lambda v, x: SCANNED.apply(v, x, None)[0]),
    "nnx": (lambda: nnx.Linear(17, 13, rngs=nnx.Rngs(0)), lambda m, x: m(x)),
    "frozen": (lambda: {"a": jnp.eye(17), "lora": jnp.ones((17, 17)) / 9},
               lambda p, x: x @ p["a"] @ p["lora"]),
    "read twice": (lambda: {"w": jnp.eye(17)},
                   lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["w"][:1]),
    "in a loop": (lambda: {"w": jnp.eye(17)}, _loop),
}


def _losses(apply):
    def mean(model, x):
        return jnp.square(apply(model, x) - 1).mean()

    def total(model, x):
        return zj.Loss(jnp.square(apply(model, x) - 1).sum(), x.size)

    return {"one loss": mean, "per device": total}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_wherever_a_padded_parameter_is_read(name, form):
    init, apply = MODELS[name]
    tx, trainable = optax.sgd(0.1), "lora" if name == "frozen" else None
    results = []
    for zero in (_zero(6), _one_device()):
        state = zero.init(init, tx, trainable=trainable)
        step = zero.train_step(_losses(apply)[form], tx, compiler_options=oracle.QUICK)
        for _ in range(2):
            state, metrics = step(state, X)
        results.append((jax.tree.leaves(zj.logical(state.params)), metrics["loss"]))
    (ours, loss), (theirs, expected) = results
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_transform_that_depends_on_padding_is_refused_by_the_step_too():
    """The state comes from an init with another transform, or from a move."""

    def centered(updates, params):
        return jax.tree.map(lambda g: g - g.mean(0, keepdims=True), updates)

    tx, zero, unpadded = optax.stateless(centered), _zero(6), _zero(6, uneven=None)
    moved = unpadded.move(unpadded.init(_init, tx), zero)
    for state in (zero.init(_init, optax.sgd(0.1)), moved):
        with pytest.raises(zj.PolicyError, match="is affected by rows of zeros"):
            zero.train_step(_sum, tx)(state, X)


@pytest.mark.parametrize("make", quick.some([optax.adagrad, optax.novograd, optax.lamb],
                                            optax.lamb.__eq__))
def test_transforms_that_do_not_depend_on_padding_are_accepted(make):
    ends = []
    for zero in (_zero(6), _one_device()):
        step = zero.train_step(_sum, make(0.1), compiler_options=oracle.QUICK)
        state = zero.init(_init, make(0.1))
        for _ in range(2):
            state, _ = step(state, X)
        ends.append(jax.tree.leaves(zj.logical(state.params)))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_users_own_loop_over_padded_parameters():
    zero = _zero(6)
    state = zero.init(_init, TX)
    differentiate = zero.jit(lambda s, x: zero.value_and_grad(_sum)(s.params, x), donate=False)
    value, grads = differentiate(state, X)
    np.testing.assert_allclose(value, _mean(_init(), X), rtol=1e-6)
    for path, g in jax.grad(_mean)(_init(), X).items():
        np.testing.assert_allclose(grads[path], g, rtol=0, atol=1e-6 * np.abs(g).max())
    evaluate = zero.jit(lambda s, x: zero.gathered(_mean)(s.params, x), donate=False)
    np.testing.assert_allclose(evaluate(state, X), value, rtol=1e-6)


def test_a_padded_array_can_be_iterated_and_has_an_arrays_methods():
    b = _zero(6).init(_init, TX).params["b"]
    assert [float(x) for x in b] == list(range(7)) and len(b) == 7 and 3.0 in b
    assert float(b.max()) == 6 and b.astype("int32").tolist() == list(range(7))
    assert b.reshape(7, 1).T.shape == (1, 7)


def test_parameters_on_other_devices_are_accepted():
    params = jax.device_put(_init(), jax.devices()[9])
    state = _zero(6).init(params, TX)
    np.testing.assert_array_equal(state.params["w"], params["w"])


def test_a_rule_at_stage_0_needs_no_padding():
    text = "dimension 1 of size 13 is not divisible by 6"
    with pytest.raises(zj.LayoutError, match=text):
        _zero(6, 0, rules={"w": P(None, "data")}).init(_init, TX)
