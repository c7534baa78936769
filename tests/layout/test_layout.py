"""Placement of leaves: the largest free divisible dimension, user's axes, rules, and reasons."""

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
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _specs(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.spec
            for path, x in jax.tree.leaves_with_path(tree)}


def _reasons(zero, state):
    return {row.path: row.reason for row in zero.layout(state).rows}


@given(st.lists(st.integers(1, 64), min_size=0, max_size=4), st.integers(2, 16), st.integers(0, 3))
def test_shard_takes_the_largest_free_dimension_that_divides(shape, n, scanned):
    leaf = Leaf("w", tuple(shape), "float32", P(*[None] * len(shape)),
                scanned if scanned < len(shape) else None)
    place = rules.shard(leaf, ("data",), n, 1)
    able = [d for i, d in enumerate(shape) if d % n == 0 and i != leaf.scanned]
    chosen = [i for i, entry in enumerate(place.spec) if entry == "data"]
    assert [shape[i] for i in chosen] == ([max(able)] if able else [])
    assert bool(place.reason) == (not able)


def test_small_and_indivisible_leaves_stay_whole_and_say_why():
    zero = _zero(min_shard=16)
    params = {"odd": jnp.ones((9, 7)), "small": jnp.ones(8), "big": jnp.ones((16, 3))}
    state = zero.init(lambda: params, optax.sgd(1.0))
    reasons = _reasons(zero, state)
    assert reasons["params/odd"] == "no free dimension of (9, 7) is divisible by 8"
    assert reasons["params/small"] == "fewer than min_shard=16 elements"
    assert reasons["params/big"] == ""
    printed = str(zero.layout(state))
    assert "P('data', None)" in printed and "no free dimension of (9, 7)" in printed


def test_whole_leaves_of_a_users_own_state_say_why():
    zero = _zero(min_shard=16)
    params = {"odd": jnp.ones((9, 7)), "big": jnp.ones((16, 3))}
    reasons = _reasons(zero, zero.create(lambda: {"params": params}))
    assert reasons == {"params/odd": "no free dimension of (9, 7) is divisible by 8",
                       "params/big": ""}


@pytest.mark.parametrize("generator, size", [("threefry2x32", 8), ("rbg", 16)])
def test_layout_bytes_are_those_of_the_shards(generator, size):
    zero = _zero()
    state = zero.init(lambda: {"w": jnp.ones((16, 8)), "b": jnp.ones(3)}, optax.adam(1e-3),
                      rng=jax.random.key(0, impl=generator))
    arrays = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert zero.layout(state).bytes == held + size  # of the key


def test_a_dimension_that_init_scans_is_never_sharded():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6)(x), None

    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)()
    state = _zero().init(lambda key: model.init(key, jnp.ones((2, 6)), None), optax.sgd(1.0),
                         jax.random.key(0))
    assert set(_specs(state.params).values()) == {P()}  # of 8 layers of 6 x 6, only the 8 divides


def test_linen_partitioning_is_extended():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(8, kernel_init=init)
    zero, tx = zj.Zero(_two_axes(), min_shard=1), optax.adam(1e-3)
    state = zero.init(model.init, tx, jax.random.key(0), jnp.ones((8, 8)))
    assert state.params["kernel"].sharding.spec == P("data", "model")
    assert state.opt_state[0].mu["kernel"].sharding.spec == P("data", "model")
    step = zero.train_step(lambda v, x: (model.apply(v, x) ** 2).mean(), tx)
    state, metrics = step(state, jnp.ones((8, 8)))
    assert state.params["kernel"].sharding.spec == P("data", "model")
    assert np.isfinite(metrics["loss"])


def test_nnx_sharding_metadata_is_extended():
    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.dense = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)

    with jax.set_mesh(_two_axes()):  # flax shards arrays that name mesh axes on creation
        zero = zj.Zero(_two_axes(), min_shard=1)
        state = zero.init(lambda: Model(nnx.Rngs(0)), optax.sgd(1.0))
    assert state.params["dense"]["kernel"].sharding.spec == P("data", "model")


def _dense(*names, logical=True):
    """Returns the init function of a layer whose kernel's dimensions have names."""
    box = nn.with_logical_partitioning if logical else nn.with_partitioning
    return nn.Dense(16, kernel_init=box(nn.initializers.lecun_normal(), names)).init


def _kernel_spec(zero, *names, logical=True):
    state = zero.init(_dense(*names, logical=logical), optax.sgd(1.0), jax.random.key(0),
                      jnp.ones((8, 8)))
    return state.params["kernel"].sharding.spec


@pytest.mark.parametrize("logical", [True, False])
def test_logical_names_follow_the_rules_in_force(logical):
    with nn.logical_axis_rules([("embed", None), ("mlp", "model")]):
        spec = _kernel_spec(zj.Zero(_two_axes(), min_shard=1), "embed", "mlp", logical=logical)
    assert spec == P("data", "model")


@pytest.mark.parametrize("logical", [True, False])
def test_a_name_that_is_no_axis_and_in_no_rule_is_an_error(logical):
    text = (r"kernel of shape \(8, 16\) over P\('embed', 'mlp'\), "
            r"but \['embed', 'mlp'\] are not axes of the mesh \('data',\)")
    with pytest.raises(zj.LayoutError, match=text):
        _kernel_spec(_zero(), "embed", "mlp", logical=logical)


def test_a_name_that_a_rule_maps_to_none_is_free():
    with nn.logical_axis_rules([("embed", None), ("mlp", None)]):
        assert _kernel_spec(_zero(), "embed", "mlp") == P(None, "data")


def test_nnx_names_follow_the_rules_in_force():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))

    def make():
        return nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))

    with nnx.use_eager_sharding(False):
        with nn.logical_axis_rules([("embed", None), ("mlp", None)]):
            state = _zero().init(make, optax.sgd(1.0))
        assert state.params["kernel"].sharding.spec == P(None, "data")
        with pytest.raises(zj.LayoutError, match="are not axes of the mesh"):
            _zero().init(make, optax.sgd(1.0))


def test_rules_place_parameters_and_their_optimizer_state():
    zero = _zero(rules={"a/.*": P("data"), "b": P()})
    params = {"a": {"w": jnp.ones((8, 16))}, "b": jnp.ones((16, 16))}
    state = zero.init(lambda: params, optax.adam(1e-3))
    assert _specs(state.params) == {"a/w": P("data"), "b": P()}
    assert _specs(state.opt_state[0].mu) == {"a/w": P("data"), "b": P()}


def test_stage_0_keeps_everything_whole_and_a_switch_needs_no_conversion():
    def loss(p, x):
        return ((x @ p["w"]) ** 2).mean()

    tx = optax.adam(1e-2)
    state = _zero(stage=0).init(lambda: {"w": jnp.ones((8, 16))}, tx)
    assert _specs(state.params) == {"w": P()}
    state, _ = _zero(stage=3).train_step(loss, tx)(state, jnp.ones((8, 8)))
    assert _specs(state.params) == {"w": P(None, "data")}
    state, _metrics = _zero(stage=1).train_step(loss, tx)(state, jnp.ones((8, 8)))
    assert _specs(state.params) == {"w": P(None, "data")} and int(state.step) == 2


def _normal(key):
    return {"w": jax.random.normal(key, (16, 8))}


def test_states_are_sharded_from_birth_and_equal_on_every_mesh():
    one, eight = (_zero(n).init(_normal, optax.adam(1e-3), jax.random.key(3)).params["w"]
                  for n in (1, 8))
    np.testing.assert_array_equal(one, eight)
    assert eight.addressable_shards[0].data.shape == (2, 8)


def test_abstract_is_init_without_arrays():
    def described(tree):
        return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]

    zero = _zero()
    state = zero.init(_normal, optax.adam(1e-3), jax.random.key(0))
    abstract = zero.abstract(_normal, optax.adam(1e-3), jax.random.key(0))
    assert described(abstract) == described(state)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


@pytest.mark.parametrize("replica, shape", [(1, {"data": 8}), (2, {"replica": 2, "data": 4})])
def test_make_mesh_has_auto_axes(replica, shape):
    mesh = zj.make_mesh(devices=jax.devices()[:8], replica=replica)
    assert dict(mesh.shape) == shape and set(mesh.axis_types) == {AxisType.Auto}
