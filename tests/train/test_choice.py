"""One loss or per device: what a loss is differentiated as, why, and that either is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zerojax as zj

SGD = optax.sgd(1.0)
KEY = jax.random.key(0)


def _zero(**settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]), **{"min_shard": 1, **settings})


class Net(nn.Module):
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (self.kernel,) * 2, (self.stride,) * 2)(images)
        return nn.Dense(10)(nn.gelu(x).mean((1, 2)))


def _images(rows):
    return {"x": jax.random.normal(KEY, (rows, 8, 8, 3)), "y": np.arange(rows) % 10}


CONVOLUTIONS = [(4, 4, 8, 1), (4, 4, 16, 2), (3, 1, 8, 1), (3, 1, 16, 1), (1, 1, 8, 1), (1, 1, 64, 1)]


@pytest.mark.parametrize("kernel, stride, rows, accumulate", CONVOLUTIONS)
def test_gradients_of_convolutions(kernel, stride, rows, accumulate):
    """XLA partitions the gradient of a vmapped convolution wrongly: by 90 %, for a 1x1 kernel at any size."""
    model, batch = Net(kernel, stride), _images(rows)
    total = lambda v, b: optax.softmax_cross_entropy_with_integer_labels(model.apply(v, b["x"]), b["y"]).sum()
    params = model.init(KEY, batch["x"])["params"]
    want = jax.jit(jax.grad(lambda p: total({"params": p}, batch) / rows))(params)
    step = _zero().train_step(lambda v, b: zj.Loss(total(v, b), len(b["y"])), SGD, accumulate=accumulate)
    state, _ = step(_zero().init(model.init, SGD, KEY, batch["x"]), batch)
    got = jax.tree.map(lambda a, b: a - np.asarray(b), params, state.params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def _weights():
    return {"w": jax.random.normal(KEY, (8, 8))}


def _sum(y):
    return zj.Loss(jnp.square(y).sum(), y.shape[0])


def _ring(p, x):
    """As a kernel that passes blocks on does it: a shard_map over the data axis."""
    mesh = zj.make_mesh(devices=jax.devices()[:8])
    turn = jax.shard_map(lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), mesh=mesh, in_specs=P("data"),
                         out_specs=P("data"))
    return _sum(turn(x @ p["w"]) + x)


def _ring_vjp(p, x):
    @jax.custom_vjp
    def ring(p, x):
        return _ring(p, x).total

    ring.defvjp(lambda p, x: (_ring(p, x).total, (p, x)), lambda kept, ct: jax.tree.map(
        lambda g: ct * g, jax.grad(lambda p, x: _ring(p, x).total, (0, 1))(*kept)))
    return zj.Loss(ring(p, x), x.shape[0])


def _pinned(p, x):
    spread = NamedSharding(zj.make_mesh(devices=jax.devices()[:8]), P("data"))
    return _sum(jax.lax.with_sharding_constraint(x @ p["w"], spread))


def _fixed(p, x):
    """Knows the size of its batch."""
    return _sum((x @ p["w"]).reshape(16, 4, 2))


def _scaled_by_callback(p, x):
    scale = jax.pure_callback(lambda x: np.float32(np.abs(x).max()), jax.ShapeDtypeStruct((), jnp.float32), x)
    return _sum(x @ p["w"] * scale)


def _looped(p, x):
    h = x @ p["w"]
    small = jax.lax.while_loop(lambda c: jnp.abs(c).max() > 0.1, lambda c: 0.7 * c, jax.lax.stop_gradient(h))
    return zj.Loss((h * small).sum(), len(x))


def _taught(p, x):
    teacher = lambda t, x: x @ t["w"]
    return _sum(x @ p["w"] - _zero().gathered(teacher)(jax.tree.map(lambda w: 2 * w, _weights()), x))


OBSTACLES = {
    "shard_map": (_ring, "has a shard_map over ['data']"),
    "shard_map in a custom_vjp": (_ring_vjp, "has a shard_map over ['data']"),
    "cond on data": (lambda p, x: _sum(jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: 2 * y, x @ p["w"])), "lax.cond or switch"),
    "switch on a key": (lambda p, x, rng: _sum(jax.lax.switch(jax.random.randint(rng, (), 0, 2), [lambda y: y, lambda y: 2 * y],
                                                              x @ p["w"])), "lax.cond or switch"),
    "pure_callback": (_scaled_by_callback, "calls the host (pure_callback)"),
    "while_loop on data": (_looped, "has a loop of unknown length"),
    "zero.gathered inside": (_taught, "gathers other parameters itself (zero.gathered)"),
    "constraint": (_pinned, "constrains activations over ['data']"),
    "size of its batch": (_fixed, "cannot be split over the batch: TypeError"),
    "mean": (lambda p, x: jnp.square(x @ p["w"]).mean(), "returns a bare mean"),
}
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _one_device(loss, rng):
    def mean(p):
        result = loss(p, X, rng) if loss.__code__.co_argcount == 3 else loss(p, X)
        return result.total / result.weight if isinstance(result, zj.Loss) else result

    return jax.jit(jax.value_and_grad(mean))(_weights())


@pytest.mark.parametrize("name", OBSTACLES)
def test_one_loss_where_a_device_cannot_differentiate_its_part(name):
    loss, why = OBSTACLES[name]
    zero = _zero()
    step, state = zero.train_step(loss, SGD), zero.init(_weights, SGD)
    demand = step._demand(state, X)
    assert demand.per_device is False and why in demand.why
    value, grads = _one_device(loss, jax.random.fold_in(state.rng, 0))
    state, metrics = step(state, X)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(_weights()["w"] - np.asarray(state.params["w"]), grads["w"], rtol=0,
                               atol=1e-5 * np.abs(grads["w"]).max())


INSISTED = {"convolution": (lambda v, b: zj.Loss(Net(3, 1).apply(v, b["x"]).sum(), 8), "has a convolution"),
            **{name: OBSTACLES[name] for name in OBSTACLES if name != "mean"}}


@pytest.mark.parametrize("name", INSISTED)
def test_who_insists_is_told_why_not(name):
    loss, why = INSISTED[name]
    zero, batch = _zero(gradients="per_device"), _images(8) if name == "convolution" else X
    init = (lambda: Net(3, 1).init(KEY, batch["x"])) if name == "convolution" else _weights
    with pytest.raises(zj.PolicyError) as caught:
        zero.train_step(loss, SGD)(zero.init(init, SGD), batch)
    assert why in str(caught.value) and 'gradients="global"' in str(caught.value)


def test_axis_names_of_pmap_are_explained():
    zero = _zero()
    with pytest.raises(zj.ModelError, match=r"mapped axis, as under pmap.*unbound axis name: batch.*leave out psum"):
        zero.train_step(lambda p, x: jax.lax.pmean((x @ p["w"]).mean(), "batch"), SGD)(zero.init(_weights, SGD), X)


def test_what_a_platform_decides_is_no_choice():
    """jax.lax.platform_dependent is a cond on the platform."""
    loss = lambda p, x: _sum(jax.lax.platform_dependent(x @ p["w"], cpu=lambda y: y, default=lambda y: y))
    zero = _zero()
    assert zero.train_step(loss, SGD)._demand(zero.init(_weights, SGD), X).per_device


def test_the_plan_says_which_way_and_why():
    zero = zj.Zero(zj.make_mesh(topology="h200:1x8"))
    x = jax.ShapeDtypeStruct((16, 8), "float32")
    title = lambda loss: zero.train_step(loss, SGD).plan(zero.abstract(_weights, SGD), x).title
    assert "one loss (the loss returns a bare mean)" in title(OBSTACLES["mean"][0])
    assert "per device (the loss is a sum over examples)" in title(lambda p, x: _sum(x @ p["w"]))


AUX = {"rows": lambda p, x: (_sum(x @ p["w"]), x @ p["w"]), "a scalar": lambda p, x: (_sum(x @ p["w"]), (x @ p["w"]).max())}


@pytest.mark.parametrize("name", AUX)
def test_aux_that_parts_cannot_make_chooses_one_loss(name):
    zero = _zero()
    run = zero.jit(lambda s, x: zero.value_and_grad(AUX[name], has_aux=True)(s["params"], x), donate=False)
    (_, aux), _ = run({"params": _weights()}, X)
    np.testing.assert_allclose(aux, AUX[name](_weights(), X)[1], rtol=1e-5, atol=1e-6)
