"""How a loss reads each parameter, found by tracing it once, abstractly; and which dimensions an init stacked.

The trace runs over boxes whose read only tags the value (`checkpoint_name`). Walking the jaxpr then needs primitive names
and nested jaxprs alone. Three answers matter:

- *hoisted*: read in a loop that does not slice it (an RNN's weights, layers that share): reduced in every iteration if
  it were read there; read above the loop instead, XLA accumulates in the loop and reduces once;
- *bare*: used without a read (a norm over `jax.tree.leaves(params)`): must be a plain, whole array;
- *often*: used more than once behind one read (tied embeddings): with one loss, XLA adds a dense and a sparse gradient
  before reducing either and so reduces one of them whole; read at each use, the two are reduced as one.
"""

import collections
import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from zerojax import specs

_LEAF, _READ = "zerojax.leaf:", "zerojax.read:"
_LOOPS = {"scan", "while"}
_CASTS = {"convert_element_type", "copy", "name"}
_MOVES = {"transpose", "stop_gradient", "copy", "slice", "dynamic_slice", "squeeze", "gather"}  # as scans and layer[i] slice


@dataclasses.dataclass(frozen=True)
class Tag:
    """Stands in for `Gather` while the census is taken."""

    path: str
    spec: P
    whole: P
    compute: str
    slices: int = 0

    @property
    def ndim(self) -> int:
        return len(self.spec)

    def drop(self, index: int) -> "Tag":
        return dataclasses.replace(self, spec=specs.drop(self.spec, index), whole=specs.drop(self.whole, index),
                                   slices=self.slices + 1)

    @property
    def one_loss(self) -> bool:
        return True

    def narrow(self) -> "Tag":
        return self

    def insert(self, index: int) -> "Tag":
        return self

    def top(self, x):
        return x.astype(self.compute)

    def __call__(self, x, gathered=None):
        return checkpoint_name(x, f"{_READ}{self.slices}:{self.path}").astype(self.compute)


def tag_leaf(x: jax.Array, path: str) -> jax.Array:
    """Marks a parameter as it enters the loss; not to be differentiated, which would move constant reads out of loops."""
    return checkpoint_name(jax.lax.stop_gradient(x), _LEAF + path)


@dataclasses.dataclass(frozen=True)
class Census:
    """Paths of parameters, by how they are read; and the mesh axes that the model's own constraints name."""

    hoisted: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    often: frozenset[str] = frozenset()
    constrained: frozenset[str] = frozenset()

    @property
    def eager(self) -> frozenset[str]:
        """Those to be gathered before the loss sees them."""
        return self.hoisted | self.bare


def take(jaxpr) -> Census:
    """The census of a traced loss."""
    found = {"hoisted": set(), "bare": set(), "often": set(), "constrained": set()}
    _walk(jaxpr, {}, 0, found)
    return Census(**{k: frozenset(v) for k, v in found.items()})


def _walk(jaxpr, leaves: dict, loops: int, found: dict) -> None:
    """`leaves`: variables that hold an unread parameter, by path."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    reads, uses = {}, collections.Counter()
    for eqn in jaxpr.eqns:
        held = {i: leaves[v] for i, v in enumerate(eqn.invars) if _is_var(v) and v in leaves}
        used = [reads[v] for v in set(filter(_is_var, eqn.invars)) if v in reads]
        if used and eqn.primitive.name == "convert_element_type":
            reads[eqn.outvars[0]] = used[0]  # a cast is no use: who uses it, is
            continue
        uses.update(used)
        name = eqn.params.get("name") if eqn.primitive.name == "name" else None
        if name and name.startswith(_LEAF):
            leaves[eqn.outvars[0]] = name.removeprefix(_LEAF)
        elif name and name.startswith(_READ):
            slices, path = name.removeprefix(_READ).split(":", 1)
            reads[eqn.outvars[0]] = path
            if loops > int(slices):
                found["hoisted"].add(path)
        elif eqn.primitive.name == "sharding_constraint":
            found["constrained"].update(specs.axes_of(getattr(eqn.params["sharding"], "spec", P())))
            leaves.update({v: path for path in held.values() for v in eqn.outvars})
        elif inner := list(_inner(eqn)):
            for body in inner:
                _walk(body, _enter(body, eqn, held), loops + (eqn.primitive.name in _LOOPS), found)
        elif eqn.primitive.name in _MOVES:
            leaves.update({v: path for path in held.values() for v in eqn.outvars})
        else:
            found["bare"].update(held.values())
    found["often"].update(path for path, n in uses.items() if n > 1)


def _is_var(v) -> bool:
    return not hasattr(v, "val")  # a literal has a value


def _inner(eqn):
    for value in eqn.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield getattr(inner, "jaxpr", inner)


def _enter(body, eqn, held: dict) -> dict:
    """`held` as the body's own variables: calls pass their last operands in order."""
    offset = len(eqn.invars) - len(body.invars)
    return {body.invars[i - offset]: path for i, path in held.items() if 0 <= i - offset < len(body.invars)}


def stacked(jaxpr) -> list[int | None]:
    """For each result of an init: the dimension along which a scan stacked it, or None.

    >>> import jax
    >>> init = lambda seed: jax.lax.scan(lambda c, _: (c + 1, jax.numpy.full((3,), c)), seed, length=4)[1]
    >>> stacked(jax.make_jaxpr(init)(0))
    [0]
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    return [_stacked(v, made) for v in jaxpr.outvars]


def _stacked(var, made) -> int | None:
    if not _is_var(var) or var not in made:
        return None
    eqn, i = made[var]
    inner = list(_inner(eqn))
    if eqn.primitive.name == "scan":
        return 0 if len(var.aval.shape) > len(inner[0].outvars[i].aval.shape) else None  # a result a turn, not a carry
    if eqn.primitive.name == "transpose":
        axis = _stacked(eqn.invars[0], made)
        return None if axis is None else list(eqn.params["permutation"]).index(axis)
    if inner and len(inner[0].outvars) == len(eqn.outvars):
        return stacked(inner[0])[i]
    return _stacked(eqn.invars[0], made) if eqn.primitive.name in _CASTS else None
