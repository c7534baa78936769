"""Loss scaling: float16 gradients below 6e-8 vanish, so the loss is multiplied before and divided after.

The rule is DeepSpeed's and jmp's: start at 2^16; a gradient that is not finite costs one of `hysteresis`, then halves the
scale; `window` finite steps in a row double it (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
"""

import jax
import jax.numpy as jnp
from flax import struct


class NoScale(struct.PyTreeNode):
    """For dtypes with float32's range: does nothing."""

    def seed(self, weight):
        """The cotangent of a total, given the weight it will be divided by."""
        return jnp.float32(1)

    def unscale(self, grads, weight):
        """Gradients of the total, given those that `seed(weight)` led to."""
        return grads

    def update(self, finite) -> "NoScale":
        return self

    def metrics(self) -> dict:
        return {}


class LossScale(struct.PyTreeNode):
    """A loss scale that looks for the largest that does not overflow.

    The seed is also divided by the weight, so that float16 sees the gradient of the mean.

    >>> s = LossScale.start()
    >>> float(s.update(False).value), float(s.update(False).update(False).value)
    (65536.0, 32768.0)
    """

    value: jax.Array
    good: jax.Array
    left: jax.Array
    window: int = struct.field(pytree_node=False, default=1000)
    hysteresis: int = struct.field(pytree_node=False, default=2)

    @classmethod
    def start(cls, value: float = 2.0**16, window: int = 1000, hysteresis: int = 2) -> "LossScale":
        return cls(jnp.float32(value), jnp.int32(0), jnp.int32(hysteresis), window, hysteresis)

    def _nonzero(self, weight):
        return jnp.where(weight == 0, 1.0, weight)

    def seed(self, weight):
        return self.value / self._nonzero(weight)

    def unscale(self, grads, weight):
        factor = self._nonzero(weight) / self.value
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), grads)

    def update(self, finite) -> "LossScale":
        """After a step whose gradient was finite or not."""
        finite = jnp.asarray(finite)
        good = jnp.where(finite, self.good + 1, 0)
        grow = good >= self.window
        halve = ~finite & (self.left <= 1)
        value = jnp.where(grow, self.value * 2, jnp.where(halve, self.value / 2, self.value))
        left = jnp.where(grow, self.hysteresis, jnp.where(finite, self.left, jnp.maximum(self.left - 1, 1)))
        return self.replace(value=jnp.clip(value, 1.0, 2.0**24), good=jnp.where(grow, 0, good), left=left)

    def metrics(self) -> dict:
        return {"loss_scale": self.value}


def for_dtype(compute: str) -> NoScale | LossScale:
    """float16 needs scaling, nothing else does."""
    return LossScale.start() if compute == "float16" else NoScale()
