"""Loss scaling for float16, in which gradients below 6e-8 vanish.

The loss is multiplied by a scale, and its gradients are divided by it. The scale follows the rule
of DeepSpeed and jmp (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2): it starts at 2^16;
`window` consecutive finite steps double it; the first `hysteresis` - 1 non-finite steps are only
counted, and each later one halves it, until the scale doubles again. It stays between 1 and 2^24.
"""

import jax
import jax.numpy as jnp
from flax import struct


class NoScale(struct.PyTreeNode):
    """No loss scaling, for dtypes with the range of float32."""

    def seed(self, weight):
        """Returns the cotangent of a total, given the weight by which it will be divided."""
        return jnp.float32(1)

    def unscale(self, grads, weight):
        """Returns gradients of the total, given those that `seed(weight)` led to."""
        return grads

    def rescale(self, grads, weight):
        """Returns gradients as `seed(weight)` leads to them, given those of the total."""
        return grads

    def update(self, finite) -> "NoScale":
        """Returns the scale after a step whose gradient was finite or not."""
        return self

    def metrics(self) -> dict:
        """Returns what a step reports of the scale."""
        return {}


class LossScale(struct.PyTreeNode):
    """A dynamic loss scale for float16, which approaches the largest one that does not overflow.

    It starts at 2^16. `window` consecutive finite steps double it. The first `hysteresis` - 1
    non-finite steps are only counted, and each later one halves it, until the scale doubles again.
    It stays between 1 and 2^24.

    Attributes:
      value: the scale.
      good: number of consecutive finite steps since the scale last doubled.
      left: number of non-finite steps up to and including the one that halves the scale.
      window: number of consecutive finite steps that double the scale.
      hysteresis: number of non-finite steps up to and including the first that halves the scale.

    >>> scale = LossScale.start()
    >>> float(scale.update(False).value), float(scale.update(False).update(False).value)
    (65536.0, 32768.0)
    """

    value: jax.Array
    good: jax.Array
    left: jax.Array
    window: int = struct.field(pytree_node=False, default=1000)
    hysteresis: int = struct.field(pytree_node=False, default=2)

    @classmethod
    def start(cls, value: float = 2.0**16, window: int = 1000, hysteresis: int = 2) -> "LossScale":
        """Returns the scale before the first step."""
        return cls(jnp.float32(value), jnp.int32(0), jnp.int32(hysteresis), window, hysteresis)

    def seed(self, weight):
        """Returns the cotangent of a total, given the weight by which it will be divided.

        The scale is divided by the weight, so that float16 holds the gradient of the mean.
        """
        return self.value / _nonzero(weight)

    def unscale(self, grads, weight):
        """Returns gradients of the total, given those that `seed(weight)` led to."""
        return _times(grads, _nonzero(weight) / self.value)

    def rescale(self, grads, weight):
        """Returns gradients as `seed(weight)` leads to them, given those of the total."""
        return _times(grads, self.seed(weight))

    def update(self, finite) -> "LossScale":
        """Returns the scale after a step whose gradient was finite or not."""
        finite = jnp.asarray(finite)
        good = jnp.where(finite, self.good + 1, 0)
        double = good >= self.window
        halve = ~finite & (self.left <= 1)
        smaller = jnp.where(halve, self.value / 2, self.value)
        value = jnp.where(double, self.value * 2, smaller)
        left = jnp.where(finite, self.left, jnp.maximum(self.left - 1, 1))
        return self.replace(value=jnp.clip(value, 1.0, 2.0**24),
                            good=jnp.where(double, 0, good),
                            left=jnp.where(double, self.hysteresis, left))

    def metrics(self) -> dict:
        """Returns what a step reports of the scale."""
        return {"loss_scale": self.value}


def _times(grads, factor):
    """Returns gradients times a factor, multiplied in float32."""
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), grads)


def _nonzero(weight):
    return jnp.where(weight == 0, 1.0, weight)


def for_dtype(compute: str) -> NoScale | LossScale:
    """Returns the scale for a compute dtype; only float16 needs one."""
    return LossScale.start() if compute == "float16" else NoScale()
