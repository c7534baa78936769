"""`zero.value_and_grad` and `zero.gathered` as transformations of functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import zerojax as zj

ROWS = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)


def _zero(stage=3, n=8, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), stage, min_shard=1, **settings)


def _make():
    return {"params": {"w": jnp.ones((8, 16))}}


def _square():
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)) / 3, jnp.float32)}


def _fit(p, x):
    return jnp.square(jnp.tanh(x @ p["w"]) - 1).mean()


def test_an_array_of_the_batchs_length_beside_it_is_not_split():
    """Then the batch is not split either, unless the caller insists on it."""
    y = np.arange(16.0, dtype=np.float32)

    def loss(p, x, y):
        return zj.Loss(((x @ p["w"]).sum(1) - y).sum(), len(x))

    def run(zero, **options):
        @functools.partial(zero.jit, donate=False, batch_argnums=(1, 2))
        def value(state, x, y):
            return zero.value_and_grad(loss, **options)(state["params"], x, y)[0]

        return float(value(zero.create(_make), np.ones((16, 8), np.float32), y))

    assert run(_zero()) == 128 - 7.5
    assert run(_zero(), batch_argnums=(1, 2), accumulate=2) == 128 - 7.5
    with pytest.raises(zj.BatchError, match=r"\(16,\).*batch_argnums"):
        run(_zero(), accumulate=2)
    with pytest.raises(zj.BatchError, match=r"accumulate=2.*no batch to split.*batch_argnums"):
        run(_zero(), accumulate=2, batch_argnums=())
    with pytest.raises(zj.PolicyError, match=r"\(16,\).*batch_argnums"):
        run(_zero(gradients="per_device"))


@pytest.mark.parametrize("gradients, accumulate, draws", [("global", 4, 4), ("per_device", 1, 8)])
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_differ_between_microbatches_and_parts(make, gradients, accumulate, draws):
    zero = _zero(gradients=gradients)

    def loss(p, x, key):
        u = jax.random.uniform(key)
        return zj.Loss((x @ p["w"]).sum(), 1.0, {"u": u, "u2": u * u})

    @functools.partial(zero.jit, donate=False)
    def run(state, x, key):
        both = zero.value_and_grad(loss, has_aux=True, accumulate=accumulate)
        return both(state["params"], x, key)[0][1]

    out = run(zero.create(_make), np.ones((32, 8), np.float32), make(0))
    assert float(out.weight) == draws
    assert float(out.aux["u2"] / draws - (out.aux["u"] / draws) ** 2) > 1e-3


def _with_aux(zero, loss, x, **options):
    """Returns the aux of a loss of ones under `zero.jit`."""
    def run(state, x):
        return zero.value_and_grad(loss, has_aux=True, **options)(state["params"], x)[0][1]

    return zero.jit(run)(zero.create(_make), x)


@pytest.mark.parametrize("settings, accumulate", [({}, 1), ({}, 2), ({"gradients": "global"}, 4)])
def test_aux_of_examples_is_returned_in_their_order(settings, accumulate):
    x = np.arange(32.0, dtype=np.float32)[:, None] * np.ones((1, 8), np.float32)

    def loss(p, x):
        return zj.Loss((x @ p["w"]).sum(), len(x)), {"rows": x[:, 0]}

    aux = _with_aux(_zero(**settings), loss, x, accumulate=accumulate)
    np.testing.assert_array_equal(aux["rows"], x[:, 0])


def test_scalar_aux_of_microbatches_is_refused():
    def loss(p, x):
        return (x @ p["w"]).mean(), x.max()

    text = r"shape \(\), which is not one row for each of the 16 examples.*zj\.Loss"
    with pytest.raises(zj.LossError, match=text):
        _with_aux(_zero(), loss, np.ones((32, 8), np.float32), accumulate=2)


def test_aux_with_as_many_rows_as_a_part_is_not_taken_for_examples():
    def loss(p, x):
        total = jnp.square(x @ p["w"]).sum()
        return zj.Loss(total, len(x)), jnp.stack([x.sum(), x.max()])

    aux = _with_aux(_zero(), loss, ROWS)
    np.testing.assert_allclose(aux, [ROWS.sum(), ROWS.max()], rtol=1e-4)
    text = r"shape \(2,\), which is not one row for each of the 2 examples"
    with pytest.raises(zj.LossError, match=text):
        _with_aux(_zero(n=1), loss, ROWS, accumulate=8)


def _functions_of_gradients(grad, value):
    """A penalty on the gradient's norm, one step of MAML, and the value, as functions of params."""
    def step(p):
        return jax.tree.map(lambda w, g: w - 0.5 * g, p, grad(p, ROWS))

    return {"penalty": lambda p: optax.global_norm(grad(p, ROWS)),
            "maml": lambda p: value(step(p), ROWS), "value": lambda p: value(p, ROWS)}


@pytest.mark.parametrize("verb", ["gathered", "value_and_grad"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_derivatives_of_derivatives(stage, verb):
    zero, params = _zero(stage), _square()
    if verb == "gathered":
        value = zero.gathered(_fit)
        ours = _functions_of_gradients(jax.grad(value), value)
    else:
        both = zero.value_and_grad(_fit)
        ours = _functions_of_gradients(lambda p, x: both(p, x)[1], lambda p, x: both(p, x)[0])
    for name, plain in _functions_of_gradients(jax.grad(_fit), _fit).items():
        want = jax.grad(plain)(params)["w"]
        got = jax.jit(jax.grad(ours[name]))(params)["w"]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_gradients_per_device_are_not_differentiated_again():
    def loss(p, x):
        return zj.Loss(_fit(p, x) * len(x), len(x))

    with pytest.raises(zj.PolicyError, match=r"itself differentiated.*zero\.gathered"):
        jax.grad(lambda p: _zero().value_and_grad(loss)(p, ROWS)[0])(_square())


def _closing_over_labels(zero, **options):
    """Returns a jitted (value, gradients) of a loss that closes over the labels `y`."""
    def run(p, x, y):
        def loss(p, x):
            return zj.Loss(jnp.square(x @ p["w"] - y).sum(), x.shape[0])

        return zero.value_and_grad(loss, **options)(p, x)

    return jax.jit(run)


@pytest.mark.parametrize("rows", [8, 16])
def test_a_closed_over_array_of_the_batchs_length_is_not_split(rows):
    x, y = ROWS[:rows], ROWS[:rows, ::-1] * 1.0
    ours = _closing_over_labels(_zero())(_square(), x, y)
    value, grads = jax.value_and_grad(
        lambda p: jnp.square(x @ p["w"] - y).sum() / len(x))(_square())
    np.testing.assert_allclose(ours[0], value, rtol=1e-5)
    np.testing.assert_allclose(ours[1]["w"], grads["w"], rtol=1e-4, atol=1e-5)


def test_a_closed_over_array_of_the_batchs_length_cannot_be_accumulated():
    run = _closing_over_labels(_zero(n=1), accumulate=16)  # one row would broadcast
    with pytest.raises(zj.BatchError, match="closes over an array of the batch's length"):
        run(_square(), ROWS, ROWS)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_closed_over_keys_differ_between_microbatches_and_parts(make):
    def masks(zero, **options):
        def run(key):
            def loss(p, x):
                mask = jax.random.bernoulli(key, 0.5, x.shape)
                return zj.Loss(((x * mask) @ p["w"]).sum(), len(x)), mask

            return zero.value_and_grad(loss, has_aux=True, **options)(_square(), ROWS)[0][1]

        return np.asarray(jax.jit(run)(make(1)))

    parts = masks(_zero()).reshape(8, 2, 8)
    assert (parts != parts[:1]).any((1, 2))[1:].all()
    micro = masks(_zero(gradients="global"), accumulate=2)
    assert (micro[::2] != micro[1::2]).any()


def test_integers_that_look_like_a_key_are_not_one():
    def loss(p, x, n):
        return _fit(p, x) * n[0].astype(jnp.float32)

    value = jax.jit(lambda n: _zero().value_and_grad(loss, accumulate=2)(_square(), ROWS, n)[0])
    expected = 100 * _fit(_square(), ROWS)
    np.testing.assert_allclose(value(jnp.array([100, 7], jnp.uint32)), expected, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_complex_parameters(accumulate):
    params = {"c": _square()["w"] + 1j * _square()["w"].T}

    def loss(p, x):
        return jnp.square(jnp.abs(x @ p["c"])).mean()

    want = jax.grad(loss)(params, ROWS)["c"]
    _, grads = jax.jit(_zero().value_and_grad(loss, accumulate=accumulate))(params, ROWS)
    np.testing.assert_allclose(grads["c"], want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_parameter_has_the_sharding_of_the_argument_that_it_is():
    """Another argument of the same path and shape is whole, so that names alone do not decide."""
    zero = _zero()
    whole = jax.device_put(_square(), jax.NamedSharding(zero.mesh, P()))
    state = {"average": whole, "params": zero.create(_square)}

    def renamed_fit(p, x):
        return _fit({"w": p["other"]}, x)

    @functools.partial(zero.jit, donate=False)
    def grads(state, x):
        params = state["params"]
        renamed = {"other": params["w"]}
        return (zero.value_and_grad(_fit)(params, x)[1]["w"],
                jax.grad(zero.gathered(renamed_fit))(renamed, x)["other"])

    assert [g.sharding.spec for g in grads(state, ROWS)] == [P(None, "data")] * 2


def test_argument_numbers():
    zero = _zero()
    last = zero.gathered(lambda x, p: _fit(p, x), -1)
    np.testing.assert_allclose(last(ROWS, _square()), _fit(_square(), ROWS), rtol=1e-5)
    text = "argnums=2, but the function was called with 2 arguments .*; write numbers below 2"
    with pytest.raises(zj.PolicyError, match=text):
        zero.gathered(_fit, 2)(_square(), ROWS)


def test_has_aux_that_does_not_fit_the_loss():
    with pytest.raises(zj.LossError, match="has_aux=True, but the loss returned"):
        _zero().value_and_grad(_fit, has_aux=True)(_square(), ROWS)
    with pytest.raises(zj.LossError, match="only with has_aux=True"):
        loss = _zero().value_and_grad(lambda p, x: zj.Loss(_fit(p, x), 1.0, {"a": 1.0}))
        loss(_square(), ROWS)
