"""Which parameters are trained; the others are frozen: they are sharded and gathered alike, and have no gradient.

| `trainable` | trained are |
|---|---|
| None | all |
| "lora/.*", a regex | those whose whole path it matches |
| a function of (path, array) | those for which it returns True; paths are as "blocks/0/kernel" |
| any other nnx filter, as nnx.LoRAParam | those that it chooses of an NNX module |
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from zerojax.errors import LayoutError, PolicyError
from zerojax.layout import rules
from zerojax.layout.rules import Leaf


def flags(trainable: Any, model: Any, paths: Sequence[str], params: Sequence[Any]) -> list[bool]:
    """Whether each of a model's parameters is trained.

    Raises:
      LayoutError: none is. PolicyError: `trainable` is none of the above.

    >>> flags("b|c", {}, ["a", "b"], [0, 0])
    [False, True]
    """
    if trainable is None:
        return [True] * len(paths)
    if isinstance(trainable, str):
        chosen = [rules.find_rule(path, [trainable]) is not None for path in paths]
    elif callable(trainable) and not isinstance(trainable, type) and not type(trainable).__module__.startswith("flax."):
        chosen = [bool(trainable(path, x)) for path, x in zip(paths, params, strict=True)]
    else:
        kept = _of_filter(trainable, model)
        chosen = [path in kept for path in paths]
    if not any(chosen):
        if isinstance(trainable, str):
            rules.check_patterns("trainable", [trainable], paths)
        raise LayoutError(f"trainable={trainable!r} chooses none of {len(paths)} parameters, as {', '.join(paths[:3])}: there is "
                          "nothing to train.")
    return chosen


def marked(leaves: Sequence[Leaf], trainable: Any, model: Any, params: Sequence[Any]) -> tuple[Leaf, ...]:
    """`leaves`, of a model's parameters, with those that are not trained marked as frozen."""
    chosen = flags(trainable, model, [leaf.path for leaf in leaves], params)
    group = lambda flag: "trained" if flag else "frozen"
    return tuple(dataclasses.replace(leaf, group=group(flag)) for leaf, flag in zip(leaves, chosen, strict=True))


def _of_filter(trainable: Any, model: Any) -> set[str]:
    """The paths of the parameters that an nnx filter chooses."""
    wrong = PolicyError(f"trainable={trainable!r}, of a {type(model).__name__}: write a regex of paths, as \"lora/.*\", a function "
                        "of (path, array), or, of an NNX module, a filter, as nnx.LoRAParam.")
    if not isinstance(model, nnx.Module):
        raise wrong
    try:
        chosen = nnx.filter_state(nnx.state(model, nnx.Param), trainable)
    except TypeError:
        raise wrong from None
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(chosen)}
