"""The search for a layout: stage, microbatches, remat and replicas, by compiling each candidate."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from zerojax import tables
from zerojax.errors import PolicyError, RecipeError, ZeroError
from zerojax.layout.mesh import make_mesh
from zerojax.layout.topology import Topology
from zerojax.plan.plan import Plan
from zerojax.precision import Precision
from zerojax.recipe import Recipe
from zerojax.tables import Printed, Sheet, quantity, seconds, size
from zerojax.zero import Zero

MIXED = Precision(compute="bfloat16")
_COLUMNS = ("stage", "accumulate", "copies", "loss", "peak", "sent per step", "step time", "MFU",
            "examples/s")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One layout of a recipe.

    Attributes:
      stage: the ZeRO stage.
      accumulate: the number of microbatches.
      remat: the name of the recipe's loss, which determines the rematerialization.
      replica: the number of copies of the state.
    """

    stage: int
    accumulate: int
    remat: str
    replica: int

    def __str__(self):
        loss = f", loss {self.remat!r}" if self.remat else ""
        return (f"stage={self.stage}, accumulate={self.accumulate}, "
                f"replica={self.replica}{loss}")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A choice with its plan, and with the reason if it has no plan or was refused.

    Attributes:
      choice: the layout.
      examples: the number of examples in a batch.
      plan: the plan, or None if there is none.
      refused: the reason for the refusal, or "".
    """

    choice: Choice
    examples: int
    plan: Plan | None
    refused: str = ""

    @property
    def rate(self) -> float:
        """The estimated examples per second over all devices; 0 without an estimate."""
        return self.examples / self.plan.compute.seconds if self.plan and self.plan.compute else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Advice(Printed):
    """All trials, and the fastest layout that fits. Prints as a table.

    Attributes:
      best: the trial with the highest estimated rate that was not refused, or None.
      tried: every trial.
    """

    best: Trial | None
    tried: tuple[Trial, ...]

    @property
    def plan(self) -> Plan | None:
        """The plan of the best trial, or None if nothing fits."""
        return self.best.plan if self.best else None

    def sheet(self) -> Sheet:
        """Returns the trials as a table, fastest first and refused ones last."""
        order = sorted(self.tried, key=lambda trial: (bool(trial.refused), -trial.rate))
        title = (f"the fastest that fits: {self.best.choice}" if self.best else
                 "no layout was accepted" if any(map(_fits, self.tried)) else "nothing fits")
        notes = tuple(trial.refused and f"refused: {trial.refused}" for trial in order)
        return Sheet(title, _COLUMNS, tuple(map(_row, order)), notes)

    def parts(self) -> Sequence[Any]:
        return [*self.sheet().parts(), *([] if self.best else [self._remedy()])]

    def to_dict(self) -> dict[str, Any]:
        """Returns the layouts and their plans as JSON values."""
        tried = [{"choice": vars(trial.choice), "refused": trial.refused,
                  "plan": trial.plan and trial.plan.to_dict()} for trial in self.tried]
        return {"best": self.best and vars(self.best.choice), "tried": tried}

    def _remedy(self) -> str:
        """Returns what to try if nothing fits."""
        peaks = [(trial.plan.memory.peak, str(trial.choice)) for trial in self.tried if trial.plan]
        if not peaks or any(map(_fits, self.tried)):
            return "The notes give the reasons; `zerojax plan` shows one layout in full."
        return (f"{min(peaks)[1]} needs the least memory. Try more GPUs or larger ones, fewer "
                "examples per microbatch, or a loss that rematerializes more, such as nn.remat "
                "with the policy zj.remat.regather().")


def _fits(trial: Trial) -> bool:
    return bool(trial.plan and trial.plan.memory.fits)


def _row(trial: Trial) -> tuple[str, ...]:
    choice = trial.choice
    layout = (str(choice.stage), str(choice.accumulate), str(choice.replica), choice.remat)
    return (*layout, *_numbers(trial))


def _numbers(trial: Trial) -> tuple[str, ...]:
    """Returns the peak, the bytes sent, the time, the MFU and the rate; blank without a plan."""
    plan = trial.plan
    if not plan or not plan.compute:
        return ("",) * 5
    return (size(plan.memory.peak), size(plan.sent), seconds(plan.compute.seconds),
            f"{plan.compute.mfu:.0%}", f"{trial.rate:,.0f}")


def advise(recipe: Recipe, topology: str | Topology, *, stages: Iterable[int] = (0, 1, 2, 3),
           accumulate: Iterable[int] | None = None, replica: Iterable[int] | None = None,
           precision: Precision = MIXED, min_shard: int = 2**16, cache: bool = True) -> Advice:
    """Compiles a recipe with many layouts for a topology, and returns the fastest that fits.

    For a batch of fixed size, more microbatches are tried only where fewer do not fit, because they
    save memory and never time. A batch that grows with the cluster also grows with the number of
    microbatches, so a step takes longer and processes more examples; then every number is tried.
    Layouts that do not divide the batch or the devices are left out, and those that are not ZeRO
    (`Plan.check`) are refused. Times are the plan's estimates.

    Args:
      recipe: the training run; if it has a dict of losses, each is tried.
      topology: the cluster, as for `make_mesh`.
      stages: the stages to try.
      accumulate: the numbers of microbatches to try. The default is 1, 2, 4 and 8 for a fixed
        batch, and 1 for a batch that grows.
      replica: the numbers of copies of the state to try. The default is one copy, and one copy per
        host.
      precision: as for `Zero`. The default computes in bfloat16.
      min_shard: as for `Zero`.
      cache: as for `TrainStep.plan`.

    Raises:
      PolicyError: the topology is invalid, or none of the layouts to try is possible.
      RecipeError: `recipe` is not a `Recipe`.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"advise was given a {type(recipe).__name__}; "
                          "write zj.Recipe(init_fn, loss_fn, tx, batch).")
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    stages = list(stages)
    microbatches = (1,) if callable(recipe.batch) else (1, 2, 4, 8)
    accumulate = _counts("accumulate", accumulate or microbatches)
    copies = _counts("replica", replica or {1, topology.hosts})
    if not stages:
        raise PolicyError("advise(stages=()): write the stages to try, such as stages=(2, 3).")
    series = list(_series(recipe, stages, copies, accumulate))
    with tqdm(desc="layouts", total=sum(map(len, series)), leave=False,
              disable=not tables.is_watched()) as bar:
        tried = [trial for choices in series
                 for trial in _watched(bar, len(choices), _until_fits(
                     recipe, topology, choices, precision, min_shard, cache))]
    if not tried:
        examples = _examples(recipe, topology.devices)
        raise PolicyError(f"advise: no layout is possible. The recipe's batch has {examples} "
                          f"examples; it must be a multiple of {topology.devices} devices x "
                          f"microbatches (tried: {accumulate}), and the number of copies (tried: "
                          f"{copies}) must divide {topology.devices}.")
    fitting = [trial for trial in tried if not trial.refused]
    return Advice(max(fitting, key=lambda trial: trial.rate, default=None), tuple(tried))


def _counts(name: str, given: Iterable[int]) -> list[int]:
    counts = list(given) if isinstance(given, Iterable) else []
    if not counts or not all(isinstance(n, int) and n > 0 for n in counts):
        raise PolicyError(f"advise({name}={given}): "
                          f"write positive integers to try, such as {name}=(1, 2).")
    return sorted(counts)


def _series(recipe: Recipe, stages: Sequence[int], copies: Sequence[int],
            accumulate: Sequence[int]) -> Iterator[list[Choice]]:
    """Yields series of choices; within each, only the number of microbatches grows."""
    for stage in stages:
        for copy in copies if stage else (1,):  # stage 0 replicates the state anyway
            for remat in recipe.losses:
                yield [Choice(stage, n, remat, copy) for n in accumulate]


def _watched(bar: tqdm, most: int, trials: Iterable[Trial]) -> Iterator[Trial]:
    """Yields trials and counts them in a progress bar; at the end, all `most` of them."""
    before = bar.n
    for trial in trials:
        yield trial
        bar.update()
    bar.update(before + most - bar.n)


def _until_fits(recipe: Recipe, topology: Topology, choices: Sequence[Choice],
                precision: Precision, min_shard: int, cache: bool) -> Iterator[Trial]:
    for choice in choices:
        parts = topology.devices * choice.accumulate
        if topology.devices % choice.replica or _examples(recipe, parts) % parts:
            continue
        trial = attempt(recipe, topology, choice, precision, min_shard, cache)
        yield trial
        if not trial.refused and not callable(recipe.batch):
            return


def _examples(recipe: Recipe, parts: int) -> int:
    """Returns the number of examples in a batch.

    If the arrays of the batch disagree, this is 1, which only a single part divides.
    """
    sizes = {x.shape[0] for x in jax.tree.leaves(recipe.rows(parts)) if getattr(x, "shape", ())}
    return sizes.pop() if len(sizes) == 1 else 1


def attempt(recipe: Recipe, topology: Topology, choice: Choice, precision: Precision,
            min_shard: int = 2**16, cache: bool = True) -> Trial:
    """Compiles one choice and judges its plan."""
    examples = _examples(recipe, topology.devices * choice.accumulate)
    try:
        plan = plan_of(recipe, topology, choice, precision, min_shard, cache)
    except ZeroError as error:
        return Trial(choice, examples, None, str(error).splitlines()[0])
    return Trial(choice, examples, plan, refusal(plan))


def refusal(plan: Plan) -> str:
    """Returns why a plan is refused; "" if it is not."""
    if not plan.memory.fits:
        return f"needs {size(plan.memory.peak)} of {size(plan.memory.usable or 0)}"
    wrong = [finding for finding in plan.findings if finding.wrong]
    if not wrong:
        return ""
    sent = size(sum(finding.bytes for finding in wrong))
    return f"not ZeRO: {quantity(len(wrong), 'finding')}, {sent}"


def plan_of(recipe: Recipe, topology: str | Topology, choice: Choice, precision: Precision,
            min_shard: int = 2**16, cache: bool = True,
            compiler_options: Mapping[str, Any] | None = None) -> Plan:
    """Returns the plan of a recipe with the layout of a choice."""
    mesh = make_mesh(topology=topology, replica=choice.replica)
    zero = Zero(mesh, choice.stage, precision=precision, min_shard=min_shard)
    state = zero.abstract(recipe.init_fn, recipe.tx, trainable=recipe.trainable)
    step = zero.train_step(recipe.loss(choice.remat), recipe.tx, accumulate=choice.accumulate,
                           compiler_options=dict(compiler_options or {}))
    return step.plan(state, recipe.rows(mesh.size * choice.accumulate), cache=cache)
