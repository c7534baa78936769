"""Islands: groups of devices that train alone and average their parameters once in a round.

Local SGD: Lin et al. 2018 (arXiv 1808.07217). DiLoCo: Douillard et al. 2023 (arXiv 2311.08105).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import ModelError, PolicyError, message_last
from zerojax.layout.report import Layout
from zerojax.policy import Policy
from zerojax.train import creation, donation, optimizer, stacked, state_layout
from zerojax.train.checks import is_optimizer
from zerojax.train.creation import Maker
from zerojax.train.island_step import IslandsStep
from zerojax.train.rounds import Rounds
from zerojax.train.stacked import IslandsState, Outer, Stack
from zerojax.train.state import TrainState


@dataclasses.dataclass(frozen=True, repr=False)
class Islands(Policy):
    """Islands of a `Zero`, made by `Zero.islands`, which documents them.

    `zj.feed(batches, islands)` splits batches over islands first, then over the devices of each.

    Attributes:
      zero: the `Zero` within an island.
      n, every, outer: as given to `Zero.islands`.
      island_axis: the mesh axis over which the islands are split.
      mesh, stage, precision, axis, replica_axis, secondary: of `zero`.
      wire, gradients, rules, min_shard, uneven: of `zero`.
    """

    zero: Policy = None  # pyright: ignore[reportAssignmentType]
    n: int = 1
    every: int = 1
    outer: Any = None
    island_axis: str = "island"

    __hash__ = Policy.__hash__

    def __repr__(self) -> str:
        outer = "" if self.outer is None else ", outer=..."
        return f"Islands({self.n}, every={self.every}{outer}) of {self.zero!r}"

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the batch's first dimension is split: islands come first."""
        return (self.island_axis, *super().batch_axes)

    @property
    def parts(self) -> int:
        """The number of parts into which the devices split a batch."""
        return self.mesh.shape[self.island_axis] * super().parts

    def init(self, init_fn: Callable, tx, *args, trainable: Any = None,
             rng: jax.Array | None = None) -> IslandsState:
        """Creates the state of all islands, in shards; all start from the same parameters.

        See `Zero.init` for the arguments and the errors. Each island draws from `rng` with its
        index folded in.
        """
        with message_last:
            init_fn, args = creation.given(self.zero, init_fn, tx, args)
            state = creation.create(
                self.zero, lambda: self._maker(init_fn, tx, args, trainable, rng), *args)
        if not isinstance(self.mesh, AbstractMesh):
            one = self._stack.shapes_of_one(state.islands)
            creation.warn_of_whole(self.zero, one)
            creation.warn_of_wire(self.zero, one)
        return state

    def abstract(self, init_fn: Callable, tx, *args, trainable: Any = None,
                 rng: jax.Array | None = None) -> IslandsState:
        """Returns the state of `init` as `ShapeDtypeStruct`s with shardings; allocates nothing."""
        with message_last:
            init_fn, args = creation.given(self.zero, init_fn, tx, args)
            return self._maker(init_fn, tx, args, trainable, rng).abstract(*args)

    def start(self, state: TrainState) -> IslandsState:
        """Returns the state of islands that all start from a state of `zero`.

        Post-local SGD trains with `zero` first, and with islands from then on. Both states take
        memory until the given one is released.

        Raises:
          ModelError: `state` is not a state of `zero.init`.
          StateError: its arrays were deleted.
        """
        if not isinstance(state, TrainState):
            raise ModelError(f"islands.start was given {trees.kind(state)}; write "
                             "islands.start(zero.init(model.init, tx, jax.random.key(0), x)).")
        self.check_devices("start")
        donation.check_alive("start", state)
        shapes = jax.eval_shape(self._started, state)
        return jax.jit(self._started, out_shardings=self._shardings(shapes))(state)

    def train_step(self, loss_fn: Callable, tx, *, accumulate: int = 1,
                   clip_norm: float | None = None, max_skipped: int | None = 50,
                   compiler_options: dict | None = None) -> IslandsStep:
        """Returns a jitted `step(state, batch) -> (state, metrics)`, which donates the state.

        Island i of n takes examples i B / n up to (i + 1) B / n of a batch of B, and makes the step
        of `Zero.train_step` with them. Steps whose number `every` divides end with an average, a
        second program. No other collective crosses islands, and no call waits for the device,
        except the first one with a state that the step did not return itself, such as one that was
        restored.

        An island whose gradient is not finite stays as it was in this step, while others move.

        Args:
          loss_fn, tx, accumulate, clip_norm, max_skipped, compiler_options: as for
            `Zero.train_step`. Gradients are clipped, and skipped steps counted, in each island.

        Returns:
          the step. Its metrics are those of `Zero.train_step`, each an array `[n, ...]` with one
          value per island. Their mean sends values between islands: take it only when you log.

        Raises:
          BatchError: the number of examples is not divisible by n x devices x accumulate.
          LossError, PolicyError, NonFiniteError: as for `Zero.train_step`.
        """
        return IslandsStep(self._rounds, loss_fn, tx, accumulate=accumulate, clip_norm=clip_norm,
                           max_skipped=max_skipped, compiler_options=compiler_options)

    def average(self, state: IslandsState) -> TrainState:
        """Returns an ordinary state of `zero` with the mean of the islands' parameters.

        For evaluation, for export, or to continue without islands. The optimizer's and the model's
        floating state are means too; integers and random keys are those of the first island. The
        state of islands stays as it is. Right after a round, all islands have these parameters.

        Raises:
          ModelError: `state` is not a state of islands.
          StateError: its arrays were deleted.
        """
        opt_state, _ = (joined := self._joined("average", state)).opt_state
        return joined.replace(opt_state=opt_state)

    def move(self, state: IslandsState, other: "Islands") -> IslandsState:
        """Returns a state for other islands: another number, mesh, stage or outer optimizer.

        All of them start from `average(state)`. The outer optimizer's state is kept if both have
        the same one, with the parameters that the round started from.

        Raises:
          ModelError: `state` is not a state of islands.
          PolicyError: `other` has other parameter dtypes, another kind of outer optimizer, or no
            devices.
        """
        if not isinstance(other, Islands):
            raise PolicyError(f"islands.move was given {trees.kind(other)}; write "
                              "islands.move(state, zero.islands(n, every=...)).")
        moved = state_layout.moved(self.zero, self._joined("move", state), other.zero)
        opt_state, outer = moved.opt_state
        new = other.start(moved.replace(opt_state=opt_state))
        if outer is None or new.outer is None:
            return new
        if jax.tree.structure(outer) != jax.tree.structure(new.outer):
            raise PolicyError("islands.move was given islands with another outer optimizer, which "
                              "keeps other state; write the same outer, or outer=None in one.")
        return new.replace(outer=outer)

    def layout(self, state: IslandsState) -> Layout:
        """Returns the placement of each leaf, as `Zero.layout` does."""
        return self._rounds.layout(state)

    def share(self) -> tuple[int, int]:
        """Returns which share of every batch this process brings to `feed`, as `Zero.share`."""
        return batches.share(self)

    def batch_sharding(self) -> NamedSharding:
        """Returns a batch's sharding: the first dimension is split over islands and devices."""
        return batches.sharding(self)

    @functools.cached_property
    def _stack(self) -> Stack:
        return Stack(self.zero, self.n, self.island_axis)

    @property
    def _rounds(self) -> Rounds:
        return Rounds(self._stack, self, self.every, self.outer)

    def _maker(self, init_fn: Callable, tx, args: tuple, trainable: Any, rng: Any) -> Maker:
        one = creation.maker(self.zero, init_fn, tx, args, trainable, rng)

        def build(*args):
            return self._started(one.build(*args))

        return Maker(build, self._shardings(jax.eval_shape(build, *args)))

    def _started(self, one: TrainState) -> IslandsState:
        outer = self.outer and Outer(one.trained, optimizer.init(self.outer, one.trained))
        return stacked.unpacked(self._stack.of(stacked.pack(one, outer)))

    def _shardings(self, shapes: IslandsState) -> IslandsState:
        if shapes.outer is not None:
            optimizer.check_padding(self.outer, shapes.outer.params)
        return stacked.unpacked(self._stack.shardings(stacked.packed(shapes)))

    def _joined(self, where: str, state: Any) -> TrainState:
        """Returns the mean of the islands, with the outer state among the optimizer's."""
        if not isinstance(state, IslandsState):
            raise ModelError(f"islands.{where} was given {trees.kind(state)}, not the state that "
                             "islands.init or the step of islands returns.")
        self.check_devices(where)
        donation.check_alive(where, state)
        return self._mean(stacked.packed(state))

    @functools.cached_property
    def _mean(self) -> Callable:
        return jax.jit(self._stack.mean)


def of(zero: Policy, n: int, every: int, outer: Any, axis: str) -> Islands:
    """Returns the islands of a policy; see `Zero.islands`, also for the errors."""
    _check_mesh(zero, n, axis)
    if not _is_count(every):
        raise PolicyError(f"islands(every={every!r}): write the number of steps from one average "
                          "to the next, 1 or more.")
    if outer is not None and not is_optimizer(outer):
        raise PolicyError(f"islands(outer={trees.kind(outer)}): write an optax transform, such as "
                          "optax.sgd(0.7, momentum=0.9, nesterov=True), or None for the plain "
                          "average.")
    settings = {f.name: getattr(zero, f.name) for f in dataclasses.fields(Policy)}
    return Islands(**settings, zero=zero, n=n, every=every, outer=outer, island_axis=axis)


def _check_mesh(zero: Policy, n: Any, axis: Any) -> None:
    shape = dict(zero.mesh.shape)
    if axis not in shape or axis in zero.batch_axes:
        why = "is one of ZeRO's own" if axis in shape else "is not among them"
        raise PolicyError(f"islands(axis={axis!r}): the mesh has the axes {shape}, and this one "
                          f"{why}; make the mesh by zj.make_mesh(islands={n!r}), or name an axis "
                          f"that ZeRO does not use. ZeRO uses {zero.batch_axes}.")
    if not _is_count(n) or n % shape[axis]:
        raise PolicyError(f"islands({n!r}): the axis {axis!r} has {shape[axis]} groups of devices, "
                          f"so the number of islands must be {shape[axis]} or a multiple of it, "
                          f"which each group then trains one after the other; or make the mesh by "
                          f"zj.make_mesh(islands={n!r}).")


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1
