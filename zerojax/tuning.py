"""The search for compiler options that hide the network: a set of them, each compiled and planned.

    default -> reductions apart, or half a layer at a time, and two at once    the base: the fastest
    base    -> gathers joined, pipelined, doubled                              one or two more each
    the fastest three -> the same with the plan's times as a profile (`plan.profile`)
    the fastest of all -> four collectives at once
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from zerojax import advice, tables
from zerojax.advice import MIXED, Choice
from zerojax.errors import CompileError, PolicyError, RecipeError
from zerojax.hlo.collectives import Collective
from zerojax.layout.topology import Topology
from zerojax.plan import hints, profile
from zerojax.plan.plan import Plan
from zerojax.policy import Precision
from zerojax.recipe import Recipe
from zerojax.tables import Code, Printed, Sheet, seconds, size

Options = dict[str, Any]
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
OVERLAP = {"xla_gpu_experimental_parallel_collective_overlap_limit": 2}
WIDER = dict.fromkeys(OVERLAP, 4)
ON = "COLLECTIVE_PIPELINING_MODE_ON"
PIPELINED = {"xla_gpu_pipeline_all_gather": ON}
DOUBLED = {**PIPELINED, "xla_gpu_pipeline_reduce_scatter": ON,
           "xla_gpu_enable_while_loop_double_buffering": True}
OLDER = {  # the names and values of options in the XLA of jax 0.10
    "xla_gpu_pipeline_all_gather": ("xla_gpu_enable_pipelined_all_gather", True),
    "xla_gpu_pipeline_reduce_scatter": ("xla_gpu_enable_pipelined_reduce_scatter", True)}
# of what the arguments leave of 80 % of the memory; the default is 95 (`hints.allowed`)
MEMORY = {"xla_gpu_memory_limit_slop_factor": 110}
PROFILED = 3  # option sets that are tried with a profile
SAME = 0.005  # of the time: of two steps that differ by less, the one with the smaller peak is best
_UNKNOWN = re.compile(r"No such compile option: '(\w+)'")
_ENDED = re.compile(r"ended with (?:exit status \d+|(signal \w+))")
_COLUMNS = ("options", "exposed", "step time", "peak")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A set of compiler options with its plan, and with the reason if it has none or was refused.

    Attributes:
      name: what the options change, in a few words.
      options: the options, as for `Zero.train_step(compiler_options=...)`.
      plan: the plan, or None if there is none.
      refused: the reason for the refusal, or "".
    """

    name: str
    options: Mapping[str, Any]
    plan: Plan | None
    refused: str = ""

    @property
    def seconds(self) -> float:
        """The estimated seconds of a step; infinite without a plan."""
        return self.plan.compute.seconds if self.plan and self.plan.compute else float("inf")

    @property
    def exposed(self) -> float:
        """The seconds per step in which only the network works; infinite without a plan."""
        compute = self.plan and self.plan.compute
        return compute.busy["network"] if compute else float("inf")


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning(Printed):
    """All attempts, and the fastest of them. Prints as a table with the line to paste.

    Attributes:
      best: the fastest attempt that fits and is ZeRO, or None.
      tried: every attempt, the compiler's default first.
      unknown: options that this version of the compiler does not know. They were left out.

    >>> print(Tuning(Attempt("overlap 2", OVERLAP, None), ()).line)
    zero.train_step(loss_fn, tx, compiler_options={
        "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    })
    """

    best: Attempt | None
    tried: tuple[Attempt, ...]
    unknown: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan | None:
        """The plan of the best attempt, or None."""
        return self.best.plan if self.best else None

    @property
    def options(self) -> Options:
        """The options of the best attempt."""
        return dict(self.best.options) if self.best else {}

    @property
    def line(self) -> str:
        """The Python code that makes a step with the best options."""
        if not self.options:
            return "zero.train_step(loss_fn, tx)"
        given = "".join(f"\n    {_quoted(name)}: {_quoted(value)},"
                        for name, value in self.options.items())
        return f"zero.train_step(loss_fn, tx, compiler_options={{{given}\n}})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the options and their plans as JSON values."""
        tried = [{"name": attempt.name, "options": dict(attempt.options),
                  "refused": attempt.refused, "plan": attempt.plan and attempt.plan.to_dict()}
                 for attempt in self.tried]
        return {"best": self.best and self.best.name, "options": self.options,
                "unknown": list(self.unknown), "tried": tried}

    def sheet(self) -> Sheet:
        """Returns the attempts as a table: the best first, refused ones and those without a plan
        last."""
        order = [*ranked(self.tried), *(attempt for attempt in self.tried if not attempt.plan)]
        notes = tuple(attempt.refused and f"refused: {attempt.refused}" for attempt in order)
        return Sheet(self._title(), _COLUMNS, tuple(map(_row, order)), notes)

    def parts(self) -> Sequence[Any]:
        left = [f"This compiler does not know: {', '.join(self.unknown)}."] if self.unknown else []
        return [*self.sheet().parts(), *left, *(["", Code(self.line)] if self.best else [])]

    def _title(self) -> str:
        if not self.best:
            return "no options were accepted; the notes give the reasons"
        title = self.best.plan.title if self.best.plan else ""
        return f"{title}\nthe fastest: {self.best.name}"


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _row(attempt: Attempt) -> tuple[str, ...]:
    if not attempt.plan:
        return (attempt.name, "", "", "")
    return (attempt.name, seconds(attempt.exposed), seconds(attempt.seconds),
            size(attempt.plan.memory.peak))


def tune(recipe: Recipe, topology: str | Topology, *, stage: int = 3, accumulate: int = 1,
         replica: int = 1, remat: str | None = None, precision: Precision = MIXED,
         min_shard: int = 2**16, profile_to: str | pathlib.Path | None = None,
         cache: bool = True) -> Tuning:
    """Compiles a step with about ten sets of compiler options, and returns the fastest that fits.

    The sets differ in how XLA joins collectives (thresholds derived from the bytes of one layer),
    how many may run at once, and whether those of a loop move to the iteration before or after. The
    fastest are compiled again with a profile, from which XLA's scheduler learns how long each
    instruction takes. Times are the plan's estimates: whether an option helps on your GPUs, only
    a run shows.

    The profile is a file that the options name. Copy it to every host, to the same path: all
    processes must compile the same program.

    Args:
      recipe: the training run.
      topology: the cluster, as for `make_mesh`.
      stage, precision, min_shard: as for `Zero`.
      accumulate: the number of microbatches.
      replica: the number of copies of the state.
      remat: the name of the recipe's loss; None is its first.
      profile_to: the file of the profile, whose name ends in ".pbtxt". By default it is in the
        folder of the cache of plans.
      cache: as for `TrainStep.plan`.

    Raises:
      CompileError, BatchError, LossError: the step does not compile with the default options.
      PolicyError: the topology, the layout or the name of the profile is invalid.
      RecipeError: `recipe` is not a `Recipe`, or it has no loss of this name.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"tune was given a {type(recipe).__name__}; "
                          "write zj.Recipe(init_fn, loss_fn, tx, batch).")
    path = None if profile_to is None else _checked(pathlib.Path(profile_to))
    name = next(iter(recipe.losses)) if remat is None else remat
    choice = Choice(stage, accumulate, name, replica)

    def plan(options: Options) -> Plan:
        return advice.plan_of(recipe, topology, choice, precision, min_shard, cache, options)

    return search(plan, path)


def _checked(path: pathlib.Path) -> pathlib.Path:
    if path.suffix != profile.SUFFIX or not path.absolute().parent.is_dir():
        raise PolicyError(f"tune(profile_to={str(path)!r}): write the path of a file in a folder "
                          f"that exists, with a name that ends in {profile.SUFFIX}, by which XLA "
                          "recognizes a profile in text form.")
    return path


def search(plan: Callable[[Options], Plan], path: pathlib.Path | None = None) -> Tuning:
    """Searches with a function that returns the plan for compiler options."""
    default = plan({})  # an error here is the user's, not that of an option
    with tqdm(desc="options", total=12, leave=False, disable=not tables.is_watched()) as bar:
        found = _Search(plan, Attempt("default", {}, default, advice.refusal(default)), bar)
        found.run(reductions(default))
        base = ranked(found.tried)[0]
        found.run((_joined(base.name, name), {**base.options, **more})
                  for name, more in additions(default))
        for fast in ranked(found.tried)[:PROFILED]:
            found.profile(fast)
        best = ranked(found.tried)[0]
        if OVERLAP.keys() <= best.options.keys():
            found.run([(best.name.replace("overlap 2", "overlap 4"), {**best.options, **WIDER})])
    return found.result(path)


def _joined(base: str, name: str) -> str:
    return name if base == "default" else f"{base}, {name}"


class _Search:
    """The attempts so far.

    Attributes:
      plan: returns the plan for options.
      tried: the attempts, the default first.
      unknown: options that the compiler does not know.
    """

    def __init__(self, plan: Callable[[Options], Plan], default: Attempt, bar: tqdm):
        self.plan = plan
        self.tried = [default]
        self.unknown: list[str] = []
        self._bar = bar
        bar.update()

    def run(self, sets: Iterable[tuple[str, Options]]) -> None:
        """Tries options by name. Those that the compiler does not know are left out."""
        for name, options in sets:
            while (more := self._one(name, self._known(options))) is not None:
                self.unknown.append(more)
            self._bar.update()

    def _known(self, options: Options) -> Options:
        """Returns options without unknown ones, which their older spelling replaces."""
        spelled = [OLDER.get(key, (key, value)) if key in self.unknown else (key, value)
                   for key, value in options.items()]
        return {key: value for key, value in spelled if key not in self.unknown}

    def _one(self, name: str, options: Options) -> str | None:
        """Tries options, unless they have been tried; returns one that the compiler does not know.
        """
        if any(options == attempt.options for attempt in self.tried):
            return None
        try:
            plan = self.plan(options)
        except CompileError as error:
            found = _UNKNOWN.search(str(error))
            if found and found[1] in options:
                return found[1]
            self.tried.append(Attempt(name, options, None, reason(error)))
        else:
            self.tried.append(Attempt(name, options, plan, advice.refusal(plan)))
        return None

    def profile(self, fast: Attempt) -> None:
        """Tries the options of an attempt with the times of its plan."""
        if fast.plan and fast.plan.runs:
            path = profile.write(fast.plan.runs)
            options = {**fast.options, profile.OPTION: str(path)}
            self.run([(f"{fast.name}, profile", options)] if path.is_file() else [])

    def result(self, path: pathlib.Path | None) -> Tuning:
        """Returns everything that was tried; with a path, the profile of the best is copied there.
        """
        best = ranked(self.tried)[0]
        if path and profile.OPTION in best.options:
            shutil.copyfile(best.options[profile.OPTION], path)
            moved = dataclasses.replace(best, options={**best.options, profile.OPTION: str(path)})
            self.tried[self.tried.index(best)], best = moved, moved
        left_out = [name for name in self.unknown
                    if name not in OLDER or OLDER[name][0] in self.unknown]
        return Tuning(None if best.refused else best, tuple(self.tried), tuple(left_out))


def ranked(tried: Iterable[Attempt]) -> list[Attempt]:
    """Returns the attempts that have a plan: accepted ones first, by time.

    Those that are at most `SAME` slower than the fastest come by their peak.
    """
    planned = [(attempt, attempt.plan) for attempt in tried if attempt.plan]
    accepted = [attempt.seconds for attempt, _ in planned if not attempt.refused]
    fast = (1 + SAME) * min(accepted, default=0.0)

    def key(pair: tuple[Attempt, Plan]) -> tuple:
        attempt, plan = pair
        return bool(attempt.refused), max(attempt.seconds, fast), plan.memory.peak

    return [attempt for attempt, _ in sorted(planned, key=key)]


def reason(error: CompileError) -> str:
    """Returns why the compiler failed, in a line."""
    text = str(error)
    lines = text.splitlines()
    ended = _ENDED.search(text)
    stopped = f"{ended[1]}: " if ended and ended[1] else ""
    return stopped + (lines[1].strip() if len(lines) > 1 else lines[0])


def reductions(plan: Plan) -> list[tuple[str, Options]]:
    """Returns options by name that keep gradients apart that XLA reduces together, and that let two
    collectives run at once."""
    sent = collections.defaultdict(float)
    for c in plan.reading.collectives:
        sent[c.kind] += c.wire_bytes
    kind = max((SCATTER, REDUCE), key=lambda kind: sent[kind])
    part = layer(plan, kind)
    if not part:
        return [("overlap 2", OVERLAP)]
    # XLA's threshold counts results: of a reduce-scatter, one device's shard
    apart, halves = {threshold(kind): 1}, {threshold(kind): round(part.results / 2)}
    return [("reduce apart", apart), ("reduce halves", halves),
            ("reduce apart, overlap 2", {**apart, **OVERLAP}),
            ("reduce halves, overlap 2", {**halves, **OVERLAP})]


def additions(plan: Plan) -> list[tuple[str, Options]]:
    """Returns options by name to add to those of the base."""
    part = layer(plan, GATHER)
    halves = {threshold(GATHER): round(part.results / 2)} if part else {}
    found = [("gather halves", halves)] if part else []
    found += [("pipelined", PIPELINED), ("pipelined, doubled", DOUBLED)
              ] if part and part.trips > 1 else []
    found += [("memory", MEMORY)] if hints.is_near_the_limit(plan.reading, plan.memory) else []
    return found


def threshold(kind: str) -> str:
    """Returns the option that limits how many bytes XLA joins in one collective.

    >>> threshold("all-gather")
    'xla_gpu_all_gather_combine_threshold_bytes'
    """
    return f"xla_gpu_{kind.replace('-', '_')}_combine_threshold_bytes"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The collectives of one kind in one layer of a model.

    Attributes:
      results: the bytes of their results on one device.
      trips: how often their computation runs: the number of layers in a loop, or of microbatches.
    """

    results: float
    trips: int


def layer(plan: Plan, kind: str) -> Layer | None:
    """Returns one layer of the loop with the most bytes, or of a program without loops.

    The layers of a program without a loop over them are counted by the paths of the parameters:
    "block_0/up/kernel" and "block_1/up/kernel" are two layers.
    """
    places = collections.defaultdict(list)
    for c in plan.reading.collectives:
        if c.kind == kind and not (kind == GATHER and c.backward):
            places[c.computation].append(c)
    if not places:
        return None
    most = max(places.values(), key=lambda found: sum(c.wire_bytes for c in found))
    trips = max(c.trips for c in most)
    count = 1 if trips > plan.reading.demand.accumulate else _layers(plan)
    return Layer(sum(map(_result, most)) / count, trips)


def _result(c: Collective) -> float:
    return c.bytes / c.size if c.kind == SCATTER else c.bytes


def _layers(plan: Plan) -> int:
    """Returns how many parameters differ only in the first number of their path."""
    count, total = collections.Counter(), collections.Counter()
    demand = plan.reading.demand
    for leaf, _ in demand.sharded:
        pattern = re.sub(r"\d+", "#", leaf.path, count=1)
        count[pattern] += 1
        total[pattern] += math.prod(leaf.shape)
    return count[max(total, key=total.__getitem__)] if total else 1
