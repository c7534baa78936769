"""Where leaves lie: largest free divisible dimension, user's axes kept, rules, and what says so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import zerojax as zj
from zerojax.layout import rules
from zerojax.layout.rules import Leaf


def _zero(n=8, **settings):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:n]), **{"min_shard": 1, **settings})


def _two_axes():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _specs(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.sharding.spec for p, x in jax.tree.leaves_with_path(tree)}


@given(st.lists(st.integers(1, 64), min_size=0, max_size=4), st.integers(2, 16), st.integers(0, 3))
def test_shard_takes_the_largest_free_dimension_that_divides(shape, n, scanned):
    leaf = Leaf("w", tuple(shape), "float32", P(*[None] * len(shape)), scanned if scanned < len(shape) else None)
    place = rules.shard(leaf, ("data",), n, 1)
    able = [d for i, d in enumerate(shape) if d % n == 0 and i != leaf.scanned]
    chosen = [i for i, entry in enumerate(place.spec) if entry == "data"]
    assert [shape[i] for i in chosen] == ([max(able)] if able else [])
    assert bool(place.reason) == (not able)


def test_small_and_indivisible_leaves_stay_whole_and_say_why():
    zero = _zero(min_shard=16)
    state = zero.init(lambda: {"odd": jnp.ones((9, 7)), "small": jnp.ones(8), "big": jnp.ones((16, 3))}, optax.sgd(1.0))
    reasons = {row.path: row.reason for row in zero.layout(state).rows}
    assert reasons["params/odd"] == "no free dimension of (9, 7) divides by 8"
    assert reasons["params/small"] == "8 elements < min_shard=16"
    assert reasons["params/big"] == ""
    assert "P('data', None)" in str(zero.layout(state)) and "no free dimension of (9, 7)" in str(zero.layout(state))


def test_whole_leaves_of_a_state_of_ones_own_say_why():
    zero = _zero(min_shard=16)
    state = zero.create(lambda: {"params": {"odd": jnp.ones((9, 7)), "big": jnp.ones((16, 3))}})
    reasons = {row.path: row.reason for row in zero.layout(state).rows}
    assert reasons == {"params/odd": "no free dimension of (9, 7) divides by 8", "params/big": ""}


def test_layout_bytes_are_those_of_the_shards():
    zero = _zero()
    state = zero.init(lambda: {"w": jnp.ones((16, 8)), "b": jnp.ones(3)}, optax.adam(1e-3))
    arrays = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert zero.layout(state).bytes == held + 8  # the key


def test_a_dimension_that_init_scans_is_never_sharded():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6)(x), None

    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)()
    state = _zero().init(lambda key: model.init(key, jnp.ones((2, 6)), None), optax.sgd(1.0), jax.random.key(0))
    assert set(_specs(state.params).values()) == {P()}  # 8 layers of 6 x 6: only the layers divide


def test_linen_partitioning_is_extended():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(8, kernel_init=init)
    zero = zj.Zero(_two_axes(), min_shard=1)
    state = zero.init(model.init, optax.adam(1e-3), jax.random.key(0), jnp.ones((8, 8)))
    assert state.params["kernel"].sharding.spec == P("data", "model")
    assert state.opt_state[0].mu["kernel"].sharding.spec == P("data", "model")
    state, metrics = zero.train_step(lambda v, x: (model.apply(v, x) ** 2).mean(), optax.adam(1e-3))(state, jnp.ones((8, 8)))
    assert state.params["kernel"].sharding.spec == P("data", "model")
    assert np.isfinite(metrics["loss"])


def test_nnx_sharding_metadata_is_extended():
    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.dense = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)

    with jax.set_mesh(_two_axes()):  # flax places what names mesh axes as it is made
        state = zj.Zero(_two_axes(), min_shard=1).init(lambda: Model(nnx.Rngs(0)), optax.sgd(1.0))
    assert state.params["dense"]["kernel"].sharding.spec == P("data", "model")


def _named(*names, logical=True):
    box = nn.with_logical_partitioning if logical else nn.with_partitioning
    return nn.Dense(16, kernel_init=box(nn.initializers.lecun_normal(), names)).init


@pytest.mark.parametrize("logical", [True, False])
def test_logical_names_follow_the_rules_in_force(logical):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    zero = zj.Zero(mesh, min_shard=1)
    with nn.logical_axis_rules([("embed", None), ("mlp", "model")]):
        state = zero.init(_named("embed", "mlp", logical=logical), optax.sgd(1.0), jax.random.key(0), jnp.ones((8, 8)))
    assert state.params["kernel"].sharding.spec == P("data", "model")


@pytest.mark.parametrize("logical", [True, False])
def test_a_name_that_is_no_axis_and_in_no_rule_is_an_error(logical):
    with pytest.raises(zj.LayoutError, match=r"kernel of shape \(8, 16\).*P\('embed', 'mlp'\); \['embed', 'mlp'\] are no axes"):
        _zero().init(_named("embed", "mlp", logical=logical), optax.sgd(1.0), jax.random.key(0), jnp.ones((8, 8)))


def test_a_name_that_a_rule_leaves_free_is_free():
    with nn.logical_axis_rules([("embed", None), ("mlp", None)]):
        state = _zero().init(_named("embed", "mlp"), optax.sgd(1.0), jax.random.key(0), jnp.ones((8, 8)))
    assert state.params["kernel"].sharding.spec == P(None, "data")


def test_nnx_names_follow_the_rules_in_force():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
    make = lambda: nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
    with nnx.use_eager_sharding(False):
        with nn.logical_axis_rules([("embed", None), ("mlp", None)]):
            assert _zero().init(make, optax.sgd(1.0)).params["kernel"].sharding.spec == P(None, "data")
        with pytest.raises(zj.LayoutError, match="are no axes of the mesh"):
            _zero().init(make, optax.sgd(1.0))


def test_rules_place_parameters_and_their_optimizer_state():
    zero = _zero(rules={"a/.*": P("data"), "b": P()})
    state = zero.init(lambda: {"a": {"w": jnp.ones((8, 16))}, "b": jnp.ones((16, 16))}, optax.adam(1e-3))
    assert _specs(state.params) == {"a/w": P("data"), "b": P()}
    assert _specs(state.opt_state[0].mu) == {"a/w": P("data"), "b": P()}


def test_stage_0_keeps_everything_whole_and_a_switch_needs_no_conversion():
    tx, init = optax.adam(1e-2), lambda: {"w": jnp.ones((8, 16))}
    loss = lambda p, x: ((x @ p["w"]) ** 2).mean()
    state = _zero(stage=0).init(init, tx)
    assert _specs(state.params) == {"w": P()}
    state, _ = _zero(stage=3).train_step(loss, tx)(state, jnp.ones((8, 8)))
    assert _specs(state.params) == {"w": P(None, "data")}
    state, _metrics = _zero(stage=1).train_step(loss, tx)(state, jnp.ones((8, 8)))
    assert _specs(state.params) == {"w": P(None, "data")} and int(state.step) == 2


def test_born_sharded_and_equal_on_every_mesh():
    init = lambda key: {"w": jax.random.normal(key, (16, 8))}
    one, eight = (_zero(n).init(init, optax.adam(1e-3), jax.random.key(3)).params["w"] for n in (1, 8))
    np.testing.assert_array_equal(one, eight)
    assert eight.addressable_shards[0].data.shape == (2, 8)


def test_abstract_is_init_without_arrays():
    zero, init = _zero(), lambda key: {"w": jax.random.normal(key, (16, 8))}
    state = zero.init(init, optax.adam(1e-3), jax.random.key(0))
    abstract = zero.abstract(init, optax.adam(1e-3), jax.random.key(0))
    of = lambda tree: [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]
    assert of(abstract) == of(state)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


@pytest.mark.parametrize("replica, shape", [(1, {"data": 8}), (2, {"replica": 2, "data": 4})])
def test_make_mesh_has_auto_axes(replica, shape):
    mesh = zj.make_mesh(devices=jax.devices()[:8], replica=replica)
    assert dict(mesh.shape) == shape and set(mesh.axis_types) == {AxisType.Auto}
