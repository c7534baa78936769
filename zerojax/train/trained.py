"""Which parameters are trained. The others are frozen: sharded and gathered, but without gradients.

| `trainable` | the trained parameters |
|---|---|
| None | all |
| a regex, such as "lora/.*" | those whose whole path it matches |
| a function of (path, array) | those for which it returns True; a path is like "blocks/0/kernel" |
| any other nnx filter, such as nnx.LoRAParam | those that it selects in an NNX module |
"""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from flax import nnx

from zerojax import errors
from zerojax.errors import LayoutError, PolicyError
from zerojax.layout import rules
from zerojax.layout.rules import Leaf


def flags(trainable: Any, model: Any, paths: Sequence[str], params: Sequence[Any]) -> list[bool]:
    """Returns, for each of a model's parameters, whether it is trained.

    Raises:
      LayoutError: no parameter is trained.
      PolicyError: `trainable` is of no kind in the table above.

    >>> flags("b|c", {}, ["a", "b"], [0, 0])
    [False, True]
    """
    if isinstance(trainable, str):
        _check_regex(trainable)
    chosen = _chosen(trainable, model, paths, params)
    if any(chosen) or trainable is None:
        if isinstance(trainable, str):
            _warn_of_unused(trainable, paths)
        return chosen
    if isinstance(trainable, str):
        rules.check_patterns("trainable", [trainable], paths)
    raise LayoutError(f"trainable={trainable!r} selects none of the {len(paths)} parameters, such "
                      f"as {', '.join(paths[:3])}, so that there is nothing to train.")


def _check_regex(trainable: str):
    try:
        re.compile(trainable)
    except re.error as error:
        raise LayoutError(f"trainable={trainable!r} is not a regular expression: {error}; write .* "
                          "for any text, such as '.*/head/.*'.") from None


def _warn_of_unused(trainable: str, paths: Sequence[str]):
    """Warns of alternatives of a regex, such as "layers_1/.*|head/.*", that match no parameter."""
    for pattern in re.split(r"\|(?![^(\[]*[)\]])", trainable):
        with contextlib.suppress(re.error):  # it was divided within parentheses
            if not any(re.fullmatch(pattern, path) for path in paths):
                errors.warn(f"trainable={trainable!r}: {pattern!r} matches no parameter, so that "
                            "it trains none. The paths are those of zero.layout(state), without "
                            "params/; layers that a scan has stacked are one parameter.")


def marked(leaves: Sequence[Leaf], trainable: Any, model: Any,
           params: Sequence[Any]) -> tuple[Leaf, ...]:
    """Returns the leaves of a model's parameters, each marked as trained or frozen."""
    chosen = flags(trainable, model, [leaf.path for leaf in leaves], params)
    return tuple(dataclasses.replace(leaf, group="trained" if flag else "frozen")
                 for leaf, flag in zip(leaves, chosen, strict=True))


def _chosen(trainable: Any, model: Any, paths: Sequence[str], params: Sequence[Any]) -> list[bool]:
    if trainable is None:
        return [True] * len(paths)
    if isinstance(trainable, str):
        return [rules.find_rule(path, [trainable]) is not None for path in paths]
    if _is_predicate(trainable):
        return [bool(trainable(path, x)) for path, x in zip(paths, params, strict=True)]
    selected = _selected(trainable, model)
    return [path in selected for path in paths]


def _is_predicate(trainable: Any) -> bool:
    """Whether it is a function of the user's; nnx filters can be callable too."""
    is_nnx = type(trainable).__module__.startswith("flax.")
    return callable(trainable) and not isinstance(trainable, type) and not is_nnx


def _selected(trainable: Any, model: Any) -> set[str]:
    """Returns the paths of the parameters that an nnx filter selects."""
    wrong = PolicyError(f"trainable={trainable!r} is not possible for a {type(model).__name__}; "
                        'write a regex for paths, such as "lora/.*", a function of (path, array), '
                        "or, for an NNX module, a filter, such as nnx.LoRAParam.")
    if not isinstance(model, nnx.Module):
        raise wrong
    try:
        state = nnx.filter_state(nnx.state(model, nnx.Param), trainable)
    except TypeError:
        raise wrong from None
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
