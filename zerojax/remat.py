"""Remat policies that keep gathered weights out of what the backward pass stores.

`jax.checkpoint` without a policy drops gathered weights and gathers them again. A policy that saves more would save
them too, unless it refuses every step between shard and use. Use these around the block that the model repeats
(`nn.remat(Block, policy=zj.remat.regather())`): around a whole scanned model, a policy has every layer gathered before
the backward loop starts.
"""

from collections.abc import Callable

import jax

_OF_A_GATHER = frozenset({"sharding_constraint", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def regather(policy: Callable[..., bool] = jax.checkpoint_policies.everything_saveable) -> Callable[..., bool]:
    """`policy`, but gathered weights are never saved: the backward pass gathers them again.

    Args:
      policy: one of `jax.checkpoint_policies`, or the user's own. By default all else is saved.

    The outputs of a user's own sharding constraints and custom_vjp functions are recomputed as well. Name them with
    `jax.ad_checkpoint.checkpoint_name` to have a policy save them.

    >>> f = jax.checkpoint(jax.numpy.sin, policy=regather())
    >>> round(float(jax.grad(f)(0.0)), 3)
    1.0
    """

    def refuse(prim, *args, **params):
        return False if prim.name in _OF_A_GATHER else policy(prim, *args, **params)

    return refuse
