"""Formats on the wire: what the model reads and the optimizer receives, and how random it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import zerojax as zj
from zerojax.gather.formats import Format

WIDTH, LAYERS, ROWS = 64, 3, 32
TX = optax.sgd(1.0)
BLOCK = 64


def init():
    keys = jax.random.split(jax.random.key(1), 3)
    return {"layers": jax.random.normal(keys[0], (LAYERS, WIDTH, 256)) / 8,
            "down": jax.random.normal(keys[1], (LAYERS, 256, WIDTH)) / 16,
            "embed": jax.random.normal(keys[2], (WIDTH, WIDTH)) / 8, "bias": jnp.zeros(WIDTH)}


def apply(params, x):
    def layer(x, w):
        up, down = w
        return x + jnp.tanh(x @ up) @ down, None

    x, _ = jax.lax.scan(layer, x @ params["embed"], (params["layers"], params["down"]))
    return x + params["bias"][None]


def loss(params, x):
    return zj.Loss((apply(params, x) ** 2).sum(), x.shape[0])


def batch(seed=0, rows=ROWS):
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def zero_of(wire, stage=3, hosts=1, **settings):
    mesh = zj.make_mesh(devices=jax.devices()[:8], hosts=hosts)
    return zj.Zero(mesh, stage, wire=wire, min_shard=1, **settings)


@functools.cache
def exact():
    """Returns the gradient on one device."""
    return jax.jit(jax.grad(lambda p, x: loss(p, x).total / ROWS))(init(), batch())


def gradient(zero, seed=0, accumulate=1):
    """Returns the gradient of one step with the key of `seed`."""
    grads, state = gradients(zero, accumulate)
    return jax.tree.map(np.asarray, grads(state, batch(), jax.random.key(seed)))


@functools.cache
def gradients(zero, accumulate=1):
    """Returns a user's own step, whose loss takes a key, and a state."""

    def grads(state, x, key):
        call = zero.value_and_grad(lambda params, x, key: loss(params, x), accumulate=accumulate)
        return call(state["params"], x, key)[1]

    return zero.jit(grads, donate=False, compiler_options=oracle.QUICK), zero.create(
        lambda: {"params": init()})


@functools.cache
def stepping(zero):
    return zero.train_step(loss, TX, compiler_options=oracle.QUICK)


def error(found, wanted):
    return {name: float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name]))
            for name in wanted}


def read(params, dtype):
    """Returns what a model reads if all but "embed" and "bias" are encoded, by numpy."""
    most = {"int8": 127, "float8_e4m3fn": 448}[dtype]

    def one(name, x):
        if name in ("embed", "bias"):
            return x
        dim = -1 if x.shape[-1] == WIDTH else -2  # the one that the mesh leaves whole
        blocks = np.moveaxis(np.asarray(x), dim, -1)
        scales = np.abs(blocks).max(-1, keepdims=True) / most
        codes = blocks / scales
        codes = np.round(codes) if dtype == "int8" else codes.astype(jnp.dtype(dtype))
        return np.moveaxis(codes.astype(np.float32) * scales, -1, dim)

    return {name: one(name, x) for name, x in params.items()}


@pytest.mark.parametrize("dtype, stage, hosts", [
    ("int8", 3, 2), pytest.param("int8", 2, 1, marks=pytest.mark.slow),
    pytest.param("float8_e4m3fn", 3, 1, marks=pytest.mark.slow),
    pytest.param("int8", 1, 1, marks=pytest.mark.slow)])
def test_the_model_reads_the_nearest_codes_and_the_optimizer_moves_all_digits(dtype, stage, hosts):
    """The gradient is that at the decoded parameters; it moves the parameters themselves."""
    secondary = "data" if hosts > 1 else None
    zero = zero_of(zj.Wire(gather=dtype, block=BLOCK), stage, hosts, secondary=secondary)
    wanted = jax.grad(lambda p, x: loss(p, x).total / ROWS)(read(init(), dtype), batch())
    found = gradient(zero)
    assert max(error(found, wanted).values()) < 2e-5
    far = error(found, exact())
    assert min(far["layers"], far["down"]) > 1e-3  # so that the test would notice exact gathers


@pytest.mark.parametrize("wire, size, hosts, secondary", [
    (zj.Wire(reduce="bfloat16"), 4e-3, 1, None),
    (zj.Wire(reduce="int8", block=BLOCK), 2e-2, 2, "data"),
    pytest.param(zj.Wire(reduce="int8", block=BLOCK), 2e-2, 1, None, marks=pytest.mark.slow),
    pytest.param(zj.Wire(reduce="bfloat16"), 6e-3, 4, None, marks=pytest.mark.slow)])
def test_reductions_are_right_on_average(wire, size, hosts, secondary):
    zero, draws = zero_of(wire, hosts=hosts, secondary=secondary), 32
    found = [gradient(zero, seed) for seed in range(draws)]
    errors = [error(x, exact()) for x in found]
    mean = {name: np.mean([x[name] for x in found], 0) for name in exact()}
    of_mean = error(mean, exact())
    for name in ("layers", "down"):
        typical = np.mean([x[name] for x in errors])
        assert size / 20 < typical < size
        assert of_mean[name] < 1.4 * typical / np.sqrt(draws)
    for name in ("bias", "embed"):  # not in blocks
        assert all((x[name] > 1e-4) == (wire.reduce == "bfloat16") for x in errors)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_other_stages_reduce_the_same(stage):
    zero = zero_of(zj.Wire(reduce="bfloat16"), stage)
    found = [gradient(zero, seed, accumulate=2) for seed in range(16)]
    mean = {name: np.mean([x[name] for x in found], 0) for name in exact()}
    assert max(error(mean, exact()).values()) < 1.4 * max(error(found[0], exact()).values()) / 4


def spread(params):
    """A sum of all elements, read in several ways; its gradient is the same in each element."""

    def layer(total, w):
        return total + w.sum(), None

    total, _ = jax.lax.scan(layer, 0.0, params["layers"])
    pieces = sum(params["pieces"][i].sum() for i in range(4))
    return total + pieces + params["one"].sum() + params["two"].sum()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_two_roundings_are_alike(accumulate):
    """Parts, layers, pieces, leaves, microbatches and steps each draw their own bits."""
    number = 1 + 2.0**-8  # halfway between two bfloat16 numbers
    zero, parts = zero_of(zj.Wire(reduce="bfloat16")), 8 * accumulate

    def make():
        return {"layers": jnp.zeros((8, 64, 64)), "pieces": jnp.zeros((4, 64, 64)),
                "one": jnp.zeros((64, 64)), "two": jnp.zeros((64, 64))}

    def total(params, x):
        return zj.Loss((spread(params) * number * jnp.ones(x.shape[0])).sum(), x.shape[0] / 8)

    state = zero.init(make, TX)
    step = zero.train_step(total, TX, accumulate=accumulate, compiler_options=oracle.QUICK)
    first, _ = step(state, batch())
    once = jax.tree.map(np.array, first.params)
    second, _ = step(first, batch())
    again = jax.tree.map(lambda a, b: np.asarray(a) - b, second.params, once)
    draws = [x for moved in (once, again)
             for x in (*moved["layers"], *moved["pieces"], moved["one"], moved["two"])]
    ups = (-np.stack(draws).reshape(len(draws), -1) - 8) * accumulate / 2.0**-7
    assert np.all((ups >= -1e-2) & (ups <= parts + 1e-2))  # how many parts were rounded up
    assert abs(ups.mean() - parts / 2) < 0.1
    assert abs(ups.var() - parts / 4) < 0.2  # of independent parts
    assert np.abs(np.corrcoef(ups) - np.eye(len(draws))).max() < 0.1


def test_scopes_that_read_a_parameter_draw_their_own_bits():
    number, zero = 1 + 2.0**-8, zero_of(zj.Wire(reduce="bfloat16"))

    def total(params, x):
        block = jax.checkpoint(lambda w: (w * number).sum())
        return zj.Loss((block(params["w"]) + block(params["w"])) * x.shape[0], x.shape[0] / 8)

    state = zero.init(lambda: {"w": jnp.zeros((64, 64))}, TX)
    step = zero.train_step(total, TX, compiler_options=oracle.QUICK)
    ups = (-np.asarray(step(state, batch())[0].params["w"]) - 16) / 2.0**-7
    assert abs(ups.mean() - 8) < 0.2 and abs(ups.var() - 4) < 0.4


def test_the_hops_draw_their_own_bits():
    """Of parts whose sum is rounded again: the second rounding does not follow the first."""
    zero = zero_of(zj.Wire(reduce="bfloat16"), hosts=2)
    number = 1 + 2.0**-9  # a part is rounded up in one of four draws

    def total(params, x):
        return zj.Loss(params["w"].sum() * number * x.shape[0], x.shape[0] / 8)

    state = zero.init(lambda: {"w": jnp.zeros((256, 256))}, TX)
    step = zero.train_step(total, TX, compiler_options=oracle.QUICK)
    moved = -np.asarray(step(state, batch())[0].params["w"], np.float64)
    assert abs(moved.mean() - 8 * number) < 3e-4


def test_a_resumed_run_rounds_the_same(tmp_path):
    zero = zero_of(zj.Wire("int8", "int8", block=BLOCK))
    step = stepping(zero)
    state = zero.init(init, TX)
    for seed in range(2):
        state, _ = step(state, batch(seed))
    with zj.Checkpointer(tmp_path) as keeper:
        keeper.save(state)
    through, _ = step(state, batch(2))
    with zj.Checkpointer(tmp_path) as keeper:
        restored = keeper.restore_latest(zero.init(init, TX, rng=jax.random.key(9))).state
    resumed, _ = step(restored, batch(2))
    for a, b in zip(*map(jax.tree.leaves, (through.params, resumed.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_own_loop_gives_the_key():
    zero = zero_of(zj.Wire(reduce="int8", block=BLOCK))

    one, again, other = (gradient(zero, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["layers"], again["layers"])
    assert np.any(one["layers"] != other["layers"])
    _, state = gradients(zero)
    constant = jax.random.key(7)
    with pytest.raises(zj.PolicyError, match=r"needs a random key that differs from step to step"):
        zero.jit(lambda state, x: zero.value_and_grad(
            lambda p, x: loss(p, x + 0 * jax.random.normal(constant)))(state["params"], x)[0],
            donate=False)(state, batch())
    with pytest.raises(zj.PolicyError, match=r"needs a random key that differs from step to step"):
        zero.jit(lambda state, x: zero.value_and_grad(loss)(state["params"], x)[0],
                 donate=False)(state, batch())


def test_a_mean_cannot_be_exchanged():
    zero = zero_of(zj.Wire(reduce="int8"))
    step = zero.train_step(lambda params, x: (apply(params, x) ** 2).mean(), TX)
    with pytest.raises(zj.PolicyError, match=r"Wire\(reduce='int8'\): the loss returns a bare mean"
                                             r".*or write Wire\(reduce=None\)"):
        step(zero.init(init, TX), batch())


def test_parameters_of_a_dtype_of_their_own_keep_it():
    zero = zero_of(zj.Wire("int8", "int8", block=BLOCK),
                   precision=zj.Precision(keep={"layers": "float32", "down": "float32"}))
    assert max(error(gradient(zero), exact()).values()) < 1e-5


def test_vectors_of_a_stack_that_only_the_loss_scans_are_not_in_blocks():
    zero = zero_of(zj.Wire("int8", "int8", block=BLOCK))

    def scanned(params, x):
        return jax.lax.scan(lambda h, v: (jnp.tanh(h * v[None]), None), x, params["v"])[0]

    def total(params, x):
        return zj.Loss((scanned(params, x) ** 2).sum(), x.shape[0])

    params = {"v": jnp.linspace(1, 2, 4 * 512).reshape(4, 512)}
    state = zero.create(lambda: {"params": params})
    x = np.ones((16, 512), np.float32)
    grads = zero.jit(lambda state, x, key: zero.value_and_grad(
        lambda p, x, key: total(p, x))(state["params"], x, key)[1], donate=False)
    wanted = jax.grad(lambda p: total(p, x).total / 16)(params)
    found = jax.tree.map(np.asarray, grads(state, x, jax.random.key(0)))
    assert error(found, wanted)["v"] < 1e-5


def test_the_error_of_each_parameter():
    zero = zero_of(zj.Wire(reduce="int8", block=BLOCK))
    state = zero.init(init, TX)
    found = stepping(zero).wire_error(state, batch())
    own = error(gradient(zero), exact())  # of another key
    assert set(found) == {"layers", "down", "embed", "bias"}
    for name, x in found.items():
        assert float(x) == pytest.approx(own[name], rel=0.05, abs=1e-5)
    plain = dataclasses.replace(zero, wire=zj.Wire())
    assert max(map(float, stepping(plain).wire_error(state, batch()).values())) == 0


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_gradient_that_is_not_finite_is_noticed(hosts):
    """The loss is finite: only the gradient shows that the step must be skipped."""
    zero = zero_of(zj.Wire("int8", "int8", block=BLOCK), hosts=hosts)

    def root(params, x):
        return zj.Loss(jnp.sqrt(((x @ params["embed"]) @ params["layers"][0]) ** 2).sum() + sum(
            w.sum() for w in jax.tree.leaves(params)), x.shape[0])

    state, bad = zero.init(init, TX), batch()
    before = jax.tree.map(np.array, state.params)
    bad[5] = 0
    after, metrics = zero.train_step(root, TX, compiler_options=oracle.QUICK)(state, bad)
    assert np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == 1
    for a, b in zip(*map(jax.tree.leaves, (before, after.params)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wrong, text", [
    ({"gather": "int4"}, r"Wire\(gather='int4'\): not a format for it; write one of 'int8', "),
    ({"gather": "bfloat16"}, r"Wire\(gather='bfloat16'\): not a format"),
    ({"reduce": "float8_e4m3fn"}, r"write one of 'bfloat16', 'int8', or None"),
    ({"block": 16}, r"Wire\(block=16\): write at least 32 elements"),
    ({"exclude": "("}, r"Wire\(exclude=...\) '\(' is not a valid regular expression")])
def test_wrong_formats(wrong, text):
    with pytest.raises(zj.PolicyError, match=text):
        zj.Wire(**wrong)


@pytest.mark.parametrize("path, excluded", [
    ("embed/embedding", True), ("Embed_0/embedding", True), ("transformer/wte/embedding", True),
    ("lm_head/kernel", True), ("head/kernel", True), ("params/Head_1/kernel", True),
    ("mlp_head/kernel", True), ("moe/router/kernel", True),
    ("MultiHeadDotProductAttention_0/query/kernel", False), ("blocks/heads/kernel", False),
    ("layers/mlp/gate/kernel", False), ("blocks/0/mlp/up", False), ("tok_emb", True),
    ("layers/mlp/bias", True), ("LayerNorm_0/scale", True), ("norm_2/weight", True)])
def test_embeddings_heads_and_routers_are_excluded(path, excluded):
    assert zj.Wire().excludes(path) == excluded
    assert not zj.Wire(exclude="never").excludes(path)


def test_formats_that_apply_to_nothing():
    small = dataclasses.replace(zero_of(zj.Wire("int8")), min_shard=2**20)
    for zero in (zero_of(zj.Wire("int8", exclude=".*")), small):
        with pytest.warns(UserWarning, match=r"Wire\(gather='int8'\) applies to none of the 4 pa"):
            zero.init(init, TX)
    with pytest.raises(zj.PolicyError, match=r"stage 0 keeps everything whole and sends no shards"):
        zero_of(zj.Wire("int8"), stage=0)


def test_formats_name_their_blocks():
    assert Format("int8", 64, -2).spec(jax.P("a", "b")) == jax.P("a", None, "b")
