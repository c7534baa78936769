"""`whole_matrices`: an optax transform whose products are computed on whole matrices, each once.

Momenta and everything else that is computed element by element stay on shards. Before a region of
the optimizer's program that multiplies matrices (see `regions`), an all-to-all moves ZeRO's axes to
a dimension along which the region treats slices independently; a second one moves them back.

| region of a parameter | how it is computed |
|---|---|
| of a stack `[layers, m, n]` | each device has `layers / N` whole matrices |
| alike k others, of single matrices | these are stacked: `[k, m, n]`, each device has `k / N` |
| unlike all others | its matrix is gathered, and every device computes the same |
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer, eval_jaxpr
from jax.extend import core as jex
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax import trees
from zerojax.plan import audit
from zerojax.policy import Policy
from zerojax.train import regions
from zerojax.train.independent import Slices, slices


def whole_matrices(policy: Policy, tx: Any) -> Any:
    """See `Zero.whole_matrices`."""
    tx = optax.with_extra_args_support(tx)
    if not policy.stage or policy.shards == 1:
        return tx

    def update(updates, state, params=None, **extra):
        arrays, put = trees.divided((updates, state, params, extra))
        if not any(isinstance(x, Tracer) for x in arrays):  # not jitted: nothing is sharded by us
            return tx.update(updates, state, params, **extra)

        def flat(*arrays):
            updates, state, params, extra = put(list(arrays))
            return tx.update(updates, state, params, **extra)

        jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*arrays)
        with jax.named_scope(audit.OPTIMIZER):
            results = _evaluated(policy, regions.inlined(jaxpr), arrays)
        return jax.tree.structure(out).unflatten(results)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _evaluated(policy: Policy, closed: Any, args: Sequence[Any]) -> list[Any]:
    """Returns the results of a program, with the operands of its regions moved."""
    jaxpr = closed.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    for level in regions.schedule(jaxpr):
        for parts in level.alike:
            operands = [[known[v] for v in part.invars] for part in parts]
            for part, results in zip(parts, _moved(policy, parts, operands), strict=True):
                known.update(zip(part.outvars, results, strict=True))
        known.update(zip(level.plain.outvars, regions.evaluated(level.plain, known), strict=True))
    return [v.val if isinstance(v, jex.Literal) else known[v] for v in jaxpr.outvars]


def _moved(policy: Policy, parts: Sequence[Any], operands: Sequence[list]) -> list[list]:
    """Returns the results of regions that are alike, from those of shards and at rest again."""

    def cost(n: int) -> float:
        """The matrices that each device computes, relative to an even share of `n`."""
        return -(-n // policy.shards) * policy.shards / n

    found = slices(parts[0], cost)
    if found and cost(found.size) <= cost(len(parts)):
        return [_by_slices(policy, _function(part), xs, found)
                for part, xs in zip(parts, operands, strict=True)]
    if len(parts) > 1:
        return _stacked(policy, parts, operands)
    return [_gathered(policy, _function(parts[0]), operands[0])]


def _function(part: Any) -> Callable[..., list]:
    return lambda *xs: eval_jaxpr(part, (), *xs)


def _by_slices(policy: Policy, run: Callable[..., list], xs: Sequence[Any], found: Slices) -> list:
    """Returns the results of a region of which each device computes some slices.

    Without the constraint on both sides of a move, XLA would move other arrays than these.
    """
    with jax.named_scope(audit.MATRICES):
        for axes in (None, policy.spec_axes):
            xs = [_put(policy, x, dim, axes) for x, dim in zip(xs, found.inputs, strict=True)]
    ys = run(*xs)
    with jax.named_scope(audit.MATRICES):
        for axes in (policy.spec_axes, None):
            ys = [_put(policy, y, dim, axes) for y, dim in zip(ys, found.results, strict=True)]
    return ys


def _put(policy: Policy, x: Any, dim: int | None, axes: tuple[str, ...] | None) -> Any:
    """Returns `x` with these mesh axes on a dimension; XLA chooses those of the others."""
    if dim is None:
        return x
    spec = P(*(axes if i == dim else P.UNCONSTRAINED for i in range(jnp.ndim(x))))
    return jax.lax.with_sharding_constraint(x, NamedSharding(policy.mesh, spec))


def _stacked(policy: Policy, parts: Sequence[Any], operands: Sequence[list]) -> list[list]:
    """Returns the results of regions that are alike, computed as one for stacks of their operands.

    An operand that all of them share is not stacked.
    """
    shared = [len(set(vs)) == 1 for vs in zip(*(part.invars for part in parts), strict=True)]
    dims = tuple(None if flag else 0 for flag in shared)
    xs = [same[0] if flag else jnp.stack(same)
          for flag, same in zip(shared, zip(*operands, strict=True), strict=True)]
    run = jax.vmap(_function(parts[0]), in_axes=dims)
    stack = Slices(len(parts), dims, (0,) * len(parts[0].outvars))
    return [list(ys) for ys in zip(*_by_slices(policy, run, xs, stack), strict=True)]


def _gathered(policy: Policy, run: Callable[..., list], xs: Sequence[Any]) -> list:
    """Returns the results of a region that every device computes. None of them is moved back."""
    whole = NamedSharding(policy.mesh, P())
    with jax.named_scope(audit.MATRICES):
        xs = jax.lax.with_sharding_constraint(list(xs), whole)
    return jax.lax.with_sharding_constraint(run(*xs), whole)
