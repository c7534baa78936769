"""`zj.muon_dimensions`: which parameters are matrices, by the names of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import zerojax as zj

D = optax.contrib.MuonDimensionNumbers


def flat(tree):
    """Returns the dimension numbers by path, without those of Adam."""
    pairs = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, D))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}


def params(case):
    return jax.eval_shape(lambda: zoo.MODELS[case]().split(zoo.MODELS[case]().init())[0])


@pytest.mark.parametrize("case, stacked, block", [
    ("scanned", "Scan.*", "ScanBlock_0"), ("unrolled", None, "Block_1")])
def test_kernels_of_linen_are_matrices(case, stacked, block):
    found = flat(zj.muon_dimensions(stacked, {"Dense_0/kernel": None})(params(case)))
    ours = {path.removeprefix(f"{block}/"): x for path, x in found.items() if block in path}
    attention = "MultiHeadDotProductAttention_0"
    assert ours == {
        **{f"{attention}/{name}/kernel": D(-3, (-2, -1)) for name in ("query", "key", "value")},
        f"{attention}/out/kernel": D((-3, -2), -1), "up/kernel": D(-2, -1),
        "down/kernel": D(-2, -1)}
    assert len(found) == len(ours) * (1 if stacked else 2)


def test_kernels_of_nnx_are_matrices_except_the_heads():
    found = flat(zj.muon_dimensions()(params("nnx")))
    assert found["blocks/0/attend/out/kernel"] == D((-3, -2), -1)
    assert found["blocks/1/up/kernel"] == D(-2, -1)
    assert len(found) == 2 * 6


def test_rules_go_before_names():
    tree = {"conv": {"kernel": jnp.ones((3, 3, 4, 8))}, "up": {"kernel": jnp.ones((4, 8))},
            "experts": {"w": jnp.ones((2, 4, 8))}}
    rules = {"conv/kernel": D((0, 1, 2), 3), "experts/w": D(-2, -1), "up/.*": None}
    assert flat(zj.muon_dimensions(rules=rules)(tree)) == {"conv/kernel": D((0, 1, 2), 3),
                                                           "experts/w": D(-2, -1)}


@pytest.mark.parametrize("stacked, shape, text", [
    (None, (3, 4, 8), r"blocks/up/kernel of shape \(3, 4, 8\) has 3 dimensions, which are not "
                      r"those of a dense .*, write stacked='blocks/\.\*'"),
    ("blocks/.*", (3, 2, 4, 8), r"has 3 dimensions after the first, a stack, .* "
                                r"rules=\{'blocks/up/kernel': optax"),
    ("layers/.*", (3, 4, 8), r"muon_dimensions: 'layers/\.\*' matches none of 1 parameters"),
])
def test_what_is_not_known_is_an_error(stacked, shape, text):
    with pytest.raises(zj.LayoutError, match=text):
        zj.muon_dimensions(stacked)({"blocks": {"up": {"kernel": jnp.ones(shape)}}})


def test_optax_takes_them_with_frozen_parameters():
    tree = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "head": {"kernel": None},
            "position": {"kernel": jnp.ones((16, 8))}}
    dimensions = zj.muon_dimensions(rules={"position/.*": None})
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=dimensions)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert updates["head"]["kernel"] is None
    alone = {"kernel": tree["up"]["kernel"]}
    muon = optax.contrib.muon(0.1)
    theirs, _ = muon.update(alone, muon.init(alone), alone)
    np.testing.assert_array_equal(updates["up"]["kernel"], theirs["kernel"])
    adam = optax.nadamw(0.1, weight_decay=0.0)
    theirs, _ = adam.update(alone, adam.init(alone), alone)
    np.testing.assert_allclose(updates["up"]["bias"], theirs["kernel"][0], rtol=1e-5)


def test_a_model_without_kernels_is_an_error():
    with pytest.raises(zj.LayoutError, match=r"none of 1 parameters, such as w, is called kernel"):
        zj.muon_dimensions()({"w": jnp.ones((4, 8))})
