"""Remat policies that never save gathered weights for the backward pass.

Without a policy, `jax.checkpoint` drops gathered weights and gathers them again. A policy that
saves more would save gathered weights too, unless it refuses every operation between a shard and
its use. Apply the policies here to the block that the model repeats
(`nn.remat(Block, policy=zj.remat.regather())`). Around a whole scanned model, a policy makes XLA
gather every layer before the backward loop starts.
"""

from collections.abc import Callable

import jax

_GATHER_PRIMITIVES = frozenset({"sharding_constraint", "custom_vjp_call",
                                "custom_vjp_call_jaxpr"})
_SAVE_ALL = jax.checkpoint_policies.everything_saveable


def regather(policy: Callable[..., bool] = _SAVE_ALL) -> Callable[..., bool]:
    """Returns `policy` changed to never save gathered weights: the backward pass gathers again.

    Args:
      policy: one of `jax.checkpoint_policies`, or your own. The default saves everything else.

    The outputs of your own sharding constraints and custom_vjp functions are recomputed as well.
    To let a policy save them, name them with `jax.ad_checkpoint.checkpoint_name`.

    >>> f = jax.checkpoint(jax.numpy.sin, policy=regather())
    >>> round(float(jax.grad(f)(0.0)), 3)
    1.0
    """

    def refuse(prim, *args, **params):
        return False if prim.name in _GATHER_PRIMITIVES else policy(prim, *args, **params)

    return refuse
