"""`muon_dimensions`: which parameters of a Flax model optax's Muon updates, as which matrices."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from optax import MaskedNode
from optax.contrib import MuonDimensionNumbers

from zerojax import trees
from zerojax.errors import LayoutError
from zerojax.layout import rules as by_path

HEADS = {"head", "lm_head", "logits"}
_PROJECTIONS = {"query", "key", "value"}
_DENSE = MuonDimensionNumbers(-2, -1)  # [inputs, outputs]
_INTO_HEADS = MuonDimensionNumbers(-3, (-2, -1))  # [inputs, heads, head_dim]
_FROM_HEADS = MuonDimensionNumbers((-3, -2), -1)  # [heads, head_dim, outputs]


def muon_dimensions(stacked: str | None = None,
                    rules: Mapping[str, MuonDimensionNumbers | None] | None = None
                    ) -> Callable[[Any], Any]:
    """Returns the `muon_weight_dimension_numbers` of `optax.contrib.muon` for a Flax model.

    Muon gets the kernels of linen's and NNX's dense and attention layers. The kernels of modules
    that are called head, lm_head or logits, and all other parameters, get Adam (Jordan 2024, "Muon:
    An optimizer for hidden layers in neural networks").

    A kernel `[inputs, heads, head_dim]` of a module called query, key or value is the matrix
    `[inputs, heads * head_dim]`; one `[heads, head_dim, outputs]` of a module called out is
    `[heads * head_dim, outputs]`; with a first dimension `layers`, there is one matrix per layer.

    Args:
      stacked: a regex for the whole paths of parameters with a first dimension `layers`, as
        `nn.scan` and `nnx.vmap` make them, such as "blocks/.*".
      rules: from a regex for whole paths to dimension numbers, or None for Adam. The first rule
        that matches replaces the choice by names. Negative numbers count from the last dimension,
        and all dimensions that a rule does not name are stacks of matrices.

    Returns:
      a function of a tree of parameters. It raises `LayoutError` for a pattern that matches no
      path, for a kernel with another number of dimensions, and if Muon would get no parameter at
      all.

    >>> import jax.numpy as jnp, optax
    >>> params = {"blocks": {"up": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((3, 4))}}}
    >>> dimensions = muon_dimensions(stacked="blocks/.*")
    >>> dimensions(params)["blocks"]["up"]["kernel"]
    MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    >>> tx = optax.contrib.muon(0.02, muon_weight_dimension_numbers=dimensions)
    """
    rules = dict(rules or {})

    def dimensions(params: Any) -> Any:
        paths = [_path(keys) for keys, _ in jax.tree.leaves_with_path(params)]
        is_whole = not _is_masked(params)  # optax calls this again with some of the parameters
        if is_whole:
            by_path.check_patterns("muon_dimensions:", [*rules, *filter(None, [stacked])], paths)
        found = jax.tree.map_with_path(lambda keys, x: one(_path(keys), x), params)
        if is_whole:
            _check_some(found, paths)
        return found

    def one(path: str, x: Any) -> MuonDimensionNumbers | None:
        rule = by_path.find_rule(path, rules)
        if rule is not None:
            return rules[rule]
        return _of_kernel(path, x, bool(stacked and re.fullmatch(stacked, path)))

    return dimensions


def _path(keys: Any) -> str:
    """Returns a parameter's path, without the key that an NNX variable ends in."""
    return trees.path_of(keys).removesuffix("/value")


def _check_some(found: Any, paths: Sequence[str]) -> None:
    """Raises `LayoutError` if all parameters get Adam."""
    if not jax.tree.leaves(found):
        raise LayoutError(
            f"muon_dimensions: none of {len(paths)} parameters, such as "
            f"{', '.join(paths[:3])}, is called kernel, so that all would get Adam; write rules, "
            f"such as rules={{{paths[0]!r}: optax.contrib.MuonDimensionNumbers(-2, -1)}}.")


def _is_masked(params: Any) -> bool:
    def is_mask(x) -> bool:
        return isinstance(x, MaskedNode)

    return any(map(is_mask, jax.tree.leaves(params, is_leaf=is_mask)))


def _of_kernel(path: str, x: Any, is_stacked: bool) -> MuonDimensionNumbers | None:
    """Returns the dimension numbers of a parameter by the names of Flax; None for Adam."""
    *_, module, name = ["", *path.split("/")]
    if name != "kernel" or module in HEADS:
        return None
    ndim = x.ndim - is_stacked
    if ndim == 2:
        return _DENSE
    if ndim == 3 and module in _PROJECTIONS:
        return _INTO_HEADS
    if ndim == 3 and module == "out":
        return _FROM_HEADS
    rest = " after the first, a stack" if is_stacked else ""
    raise LayoutError(
        f"muon_dimensions: {path} of shape {x.shape} has {ndim} dimensions{rest}, which are not "
        "those of a dense or attention layer. If its first dimension is a stack of layers, write "
        f"stacked={path.split('/')[0] + '/.*'!r}; else a rule with the dimensions of its matrix, "
        f"rules={{{path!r}: optax.contrib.MuonDimensionNumbers(-2, -1)}}, or None for Adam.")
