"""Which stage, accumulation, remat and number of copies: by compiling each, not by formula."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax

from zerojax.errors import PolicyError, RecipeError, ZeroError
from zerojax.layout.mesh import make_mesh
from zerojax.layout.topology import Topology
from zerojax.plan.plan import Plan
from zerojax.policy import Precision
from zerojax.recipe import Recipe
from zerojax.tables import Sheet, seconds, size
from zerojax.zero import Zero


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to lay a recipe out: stage, microbatches, the name of the loss (how it rematerialises), copies of the state."""

    stage: int
    accumulate: int
    remat: str
    replica: int

    def __str__(self):
        parts = [f"stage={self.stage}", f"accumulate={self.accumulate}", f"replica={self.replica}"]
        return ", ".join(parts + ([f"loss {self.remat!r}"] if self.remat else []))


@dataclasses.dataclass(frozen=True)
class Trial:
    """A choice with its plan; or with why there is none, or why it was refused."""

    choice: Choice
    examples: int
    plan: Plan | None
    refused: str = ""

    @property
    def rate(self) -> float:
        """Examples a second, over all devices, by the estimate."""
        return self.examples / self.plan.compute.seconds if self.plan and self.plan.compute else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Advice:
    """The fastest that fits, by the estimate, and all that were tried. Prints as a table."""

    best: Trial | None
    tried: tuple[Trial, ...]

    @property
    def plan(self) -> Plan | None:
        return self.best.plan if self.best else None

    def sheet(self) -> Sheet:
        order = sorted(self.tried, key=lambda t: (bool(t.refused), -t.rate))
        title = f"the fastest that fits: {self.best.choice}" if self.best else "nothing fits"
        columns = ("stage", "accumulate", "copies", "loss", "peak", "sent a step", "step", "MFU", "examples/s", "refused because")
        return Sheet(title, columns, tuple(map(_row, order)))

    def __str__(self) -> str:
        return str(self.sheet())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.sheet()._repr_html_()


def _row(trial: Trial) -> tuple[str, ...]:
    c, p = trial.choice, trial.plan
    figures = ("",) * 5
    if p and p.compute:
        figures = size(p.memory.peak), size(p.sent), seconds(p.compute.seconds), f"{p.compute.mfu:.0%}", f"{trial.rate:,.0f}"
    return (str(c.stage), str(c.accumulate), str(c.replica), c.remat, *figures, trial.refused)


MIXED = Precision(compute="bfloat16")


def advise(recipe: Recipe, topology: str | Topology, *, stages: Iterable[int] = (0, 1, 2, 3),
           accumulate: Iterable[int] | None = None, replica: Iterable[int] | None = None, precision: Precision = MIXED,
           min_shard: int = 2**16, cache: bool = True) -> Advice:
    """Compiles a recipe in many ways for a topology, and says which is the fastest that fits.

    Of a batch of fixed size, more microbatches are tried only where fewer do not fit: they save memory, and time in no case. A
    batch that grows with the cluster grows with the microbatches, too, so that a step costs more and is worth more: each is tried.
    What does not divide is left out, and what is not ZeRO's (`Plan.check`) is refused. The time is the plan's estimate.

    Args:
      recipe: with a dict of losses, each is tried.
      topology: as for `make_mesh`; of one GPU or more.
      stages, accumulate, replica: what to try. Microbatches: by default 1, 2, 4 and 8 of a fixed batch, 1 of a growing one.
        Copies: by default one for all, and one a host.
      precision, min_shard: as for `Zero`.
      cache: as for `TrainStep.plan`.

    Raises:
      PolicyError: the topology is none, or nothing that was to be tried is possible.
      RecipeError: no `Recipe`.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"advise was given a {type(recipe).__name__}; write zj.Recipe(init_fn, loss_fn, tx, batch).")
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    stages = list(stages)
    accumulate = _counts("accumulate", accumulate or ((1,) if callable(recipe.batch) else (1, 2, 4, 8)))
    copies = _counts("replica", replica or {1, topology.hosts})
    tried = []
    for stage in stages:
        for copy in copies if stage else (1,):
            for remat in recipe.losses:
                choices = [Choice(stage, a, remat, copy) for a in accumulate]
                tried += _until_fits(recipe, topology, choices, precision, min_shard, cache)
    if not tried:
        if not stages:
            raise PolicyError("advise(stages=()): write stages to try, as stages=(2, 3).")
        raise PolicyError(f"advise: the recipe's batch of {_examples(recipe, topology.devices)} examples does not divide over "
                          f"{topology.devices} devices x any of {list(accumulate)} microbatches, with copies of {list(copies)}.")
    fitting = [t for t in tried if not t.refused]
    return Advice(max(fitting, key=lambda t: t.rate, default=None), tuple(tried))


def _counts(name: str, given: Iterable[int]) -> list[int]:
    counts = list(given) if isinstance(given, Iterable) else []
    if not counts or not all(isinstance(n, int) and n > 0 for n in counts):
        raise PolicyError(f"advise({name}={given}): write positive integers to try, as {name}=(1, 2).")
    return sorted(counts)


def _until_fits(recipe: Recipe, topology: Topology, choices: Sequence[Choice], precision, min_shard, cache) -> Iterator[Trial]:
    for choice in choices:
        parts = topology.devices * choice.accumulate
        if topology.devices % choice.replica or _examples(recipe, parts) % parts:
            continue
        trial = attempt(recipe, topology, choice, precision, min_shard, cache)
        yield trial
        if not trial.refused and not callable(recipe.batch):
            return


def _examples(recipe: Recipe, parts: int) -> int:
    """Of a batch; 1, which nothing but one device divides, if its arrays disagree."""
    sizes = {x.shape[0] for x in jax.tree.leaves(recipe.rows(parts)) if getattr(x, "shape", ())}
    return sizes.pop() if len(sizes) == 1 else 1


def attempt(recipe: Recipe, topology: Topology, choice: Choice, precision: Precision, min_shard: int = 2**16,
            cache: bool = True) -> Trial:
    """One choice, compiled and judged."""
    examples = _examples(recipe, topology.devices * choice.accumulate)
    try:
        plan = plan_of(recipe, topology, choice, precision, min_shard, cache)
    except ZeroError as error:
        return Trial(choice, examples, None, str(error).splitlines()[0])
    m, wrong = plan.memory, [f for f in plan.findings if f.wrong]
    if not m.fits:
        return Trial(choice, examples, plan, f"needs {size(m.peak)} of {size(m.usable or 0)}")
    return Trial(choice, examples, plan, f"not ZeRO: {len(wrong)} findings, {size(sum(f.bytes for f in wrong))}" if wrong else "")


def plan_of(recipe: Recipe, topology: str | Topology, choice: Choice, precision: Precision, min_shard: int = 2**16,
            cache: bool = True) -> Plan:
    """The plan of a recipe laid out as a choice says."""
    mesh = make_mesh(topology=topology, replica=choice.replica)
    zero = Zero(mesh, choice.stage, precision=precision, min_shard=min_shard)
    state = zero.abstract(recipe.init_fn, recipe.tx, trainable=recipe.trainable)
    step = zero.train_step(recipe.loss(choice.remat), recipe.tx, accumulate=choice.accumulate)
    return step.plan(state, recipe.rows(mesh.size * choice.accumulate), cache=cache)
