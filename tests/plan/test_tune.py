"""The search for compiler options: its sets, their ranking, and the line to paste."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import models
import optax
import pytest
from moves import DATA, moved

import zerojax as zj
from zerojax import advice, cli, tuning
from zerojax.hlo.schedule import Run, Span
from zerojax.layout.rules import Leaf
from zerojax.plan import cache, hints, profile

TOPOLOGY = "h100:8x8"
GATHERS = [moved("all-gather", (1024, 2048), trips=6, name=f"gather_{i}") for i in range(3)]
SCATTERS = [moved("reduce-scatter", (1024, 2048), trips=6, backward=True)]
REDUCE, GATHER = map(tuning.threshold, ("reduce-scatter", "all-gather"))
OVERLAP, = tuning.OVERLAP
MIB = 2**20


def fake(seconds, peak=100.0, fits=True, findings=(), collectives=(*GATHERS, *SCATTERS),
         leaves=(), accumulate=1):
    """Returns the parts of a plan that the search reads."""
    spans = (Span("gather_0", "network", 0.0, seconds / 2),)
    demand = SimpleNamespace(accumulate=accumulate, sharded=[(leaf, None) for leaf in leaves])
    return SimpleNamespace(
        compute=SimpleNamespace(seconds=seconds, busy={"network": seconds / 10}, mfu=0.5),
        memory=SimpleNamespace(peak=peak, fits=fits, usable=200.0), findings=findings,
        reading=SimpleNamespace(collectives=collectives, demand=demand, topology=None),
        runs={"main": Run(seconds, {}, spans, {}, {})}, title="a step", to_dict=dict)


def searched(time, path=None, **known):
    """Returns the search among plans whose time is a function of their options."""
    return tuning.search(lambda options: fake(time(options), **known), path)


def words_of(found):
    """Returns the printed table in one line: its width depends on the terminal."""
    return " ".join(str(found).split())


def test_the_fastest_is_first_and_reductions_apart_are_its_base():
    found = searched(lambda o: 10 - 3 * (REDUCE in o) - (OVERLAP in o) - 0.5 * (GATHER in o))
    names = [attempt.name for attempt in found.tried]
    assert names[:3] == ["default", "reduce apart", "reduce halves"] and len(names) <= 13
    assert found.best.options.keys() == {REDUCE, GATHER, OVERLAP}
    assert all(REDUCE in attempt.options for attempt in found.tried[1:])
    rows = [row[0] for row in found.sheet().rows]
    assert rows[0] == found.best.name and rows[-1] == "default"


def test_the_base_is_the_default_where_nothing_else_is_faster():
    found = searched(lambda o: 10 + len(o))
    assert found.best.name == "default" and found.options == {}
    assert found.line == "zero.train_step(loss_fn, tx)"
    assert "reduce halves, overlap 2" in [attempt.name for attempt in found.tried]


def test_the_base_is_chosen_with_two_collectives_at_once():
    """Reductions in halves may be slower than apart, and faster with two at once."""
    def seconds(options):
        halves = options.get(REDUCE, 0) > 1
        return 10 - (REDUCE in options) + 0.1 * halves - (OVERLAP in options) * (1 + halves)

    assert searched(seconds).best.options[REDUCE] > 1


def test_of_equal_times_the_smaller_peak_is_best():
    found = tuning.search(lambda o: fake(10 + 0.001 * len(o), peak=100 - len(o)))
    assert len(found.options) == max(len(attempt.options) for attempt in found.tried) > 2


@pytest.mark.parametrize("refused, words", [
    ({"fits": False}, "needs 100 bytes of 200 bytes"),
    ({"findings": [SimpleNamespace(wrong=True, bytes=5.0)]}, "not ZeRO: 1 finding, 5 bytes")])
def test_a_plan_that_is_refused_is_a_row_and_not_the_best(refused, words):
    def plan(options):
        return fake(5, **refused) if OVERLAP in options else fake(10 - (REDUCE in options))

    found = tuning.search(plan)
    assert OVERLAP not in found.best.options
    assert words in words_of(found)


def test_options_that_the_compiler_does_not_know_are_left_out():
    """The message is the compiler's; `test_compiler` has it from there."""
    def plan(options):
        for name in options:
            if name in (OVERLAP, *tuning.OLDER):
                raise zj.CompileError(f"...\n  INVALID_ARGUMENT: No such compile option: '{name}'")
        return fake(10 - len(options))

    found = tuning.search(plan)
    tried = {name for attempt in found.tried for name in attempt.options}
    assert not tried & {OVERLAP, *tuning.OLDER}
    assert {older for older, _ in tuning.OLDER.values()} <= tried
    assert set(found.unknown) == {OVERLAP} and f"does not know: {OVERLAP}" in words_of(found)


def test_an_unknown_option_of_somebody_else_is_a_failure():
    def plan(options):
        if OVERLAP in options:
            raise zj.CompileError("...\n  INVALID_ARGUMENT: No such compile option: 'xla_other'")
        return fake(10)

    assert "refused: INVALID_ARGUMENT: No such compile option: 'xla_other'" in words_of(
        tuning.search(plan))


@pytest.mark.parametrize("ended, reason", [
    ("exit status 1", "INTERNAL: it failed"), ("signal SIGABRT", "signal SIGABRT: INTERNAL: it")])
def test_a_compile_that_fails_is_a_row_with_its_reason(ended, reason):
    def plan(options):
        if OVERLAP in options:
            raise zj.CompileError(f"the compiler process ended with {ended}. Options: {options}. "
                                  "From its output:\n  INTERNAL: it failed\n  more")
        return fake(10)

    found = tuning.search(plan)
    failed = [attempt for attempt in found.tried if not attempt.plan]
    assert len(failed) == 2 and all(attempt.refused.startswith(reason) for attempt in failed)
    assert f"refused: {reason}" in words_of(found)


def test_an_error_of_the_default_is_an_error():
    def plan(options):
        raise zj.CompileError("the compiler failed")

    with pytest.raises(zj.CompileError):
        tuning.search(plan)


def test_the_printed_line_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    path = tmp_path / "a_folder_with_a_name_that_is_longer_than_a_line_of_the_terminal"
    path.mkdir()
    found = searched(lambda o: 10 - 2 * (profile.OPTION in o), path / "times.pbtxt")
    assert len(str(path)) > 60 and found.line in str(found)


def test_the_fastest_are_tried_with_their_times_and_the_file_is_that_of_the_best(tmp_path):
    path = tmp_path / "times.pbtxt"
    found = searched(lambda o: 10 - 2 * (profile.OPTION in o) - (REDUCE in o), path)
    profiled = [attempt for attempt in found.tried if profile.OPTION in attempt.options]
    assert len(profiled) == tuning.PROFILED
    assert found.options[profile.OPTION] == str(path) and f'"{path}"' in found.line
    assert path.read_text() == 'costs { name: "gather_0" cost_us: 4500000.000 }\n'


def test_a_layer_in_a_loop_is_what_an_iteration_gathers():
    three = 3 * 1024 * 2048 * 2
    assert tuning.layer(fake(1), "all-gather") == tuning.Layer(three, 6)
    assert tuning.layer(fake(1), "reduce-scatter").results == 1024 * 2048 * 2 / len(DATA[0])
    assert tuning.layer(fake(1), "all-reduce") is None
    assert tuning.additions(fake(1))[0] == ("gather halves", {GATHER: three // 2})


def test_unrolled_layers_are_counted_by_paths():
    """A loop over microbatches is no loop over layers."""
    leaves = [Leaf(f"block_{i}/Dense_{j}/kernel", (8, 8), "float32", None)
              for i in range(12) for j in range(2)]
    leaves.append(Leaf("head", (8, 16), "float32", None))
    one = fake(1, collectives=GATHERS, leaves=leaves, accumulate=6)
    assert tuning.layer(one, "all-gather").results == 3 * 1024 * 2048 * 2 / 12


def test_without_a_loop_nothing_is_pipelined():
    once = [dataclasses.replace(c, trips=1) for c in GATHERS]
    names = [name for name, _ in tuning.additions(fake(1, collectives=once))]
    assert names == ["gather halves"]


def test_a_changed_profile_is_another_program(tmp_path):
    """The path is the same, so that the options do not show it."""
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    path = tmp_path / "times.pbtxt"
    places = []
    for text in ("a", "b", "a"):
        path.write_text(text)
        places.append(cache.path_of(lowered, {"options": {profile.OPTION: str(path)}}, ""))
    assert places[0] == places[2] != places[1]


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Returns a function that runs `zerojax tune` over fake plans.

    The function returns the status, the output and the arguments of each plan.
    """
    file = tmp_path / "training.py"
    file.write_text("import jax, optax, zerojax as zj\n"
                    "recipe = zj.Recipe(dict, {'none': print, 'block': print}, optax.sgd(0.1),\n"
                    "                   jax.ShapeDtypeStruct((8,), 'float32'))")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*options, **known):
        asked = []

        def plan_of(recipe, *given):
            asked.append(given)
            return fake(10 - len(given[-1]), **known)

        monkeypatch.setattr(advice, "plan_of", plan_of)
        status = cli.main(["tune", str(file), "--topology", TOPOLOGY, *options])
        return status, capsys.readouterr().out, asked

    return run


def test_the_command_prints_the_table_and_the_line(command):
    status, out, asked = command("--stage", "2", "--accumulate", "4", "--replica", "8", "--remat",
                                 "block", "--no-cache", "--reduce", "float32")
    assert status == 0 and "the fastest: reduce " in out
    assert "zero.train_step(loss_fn, tx, compiler_options={" in out
    topology, choice, precision, _, cached, options = asked[0]
    assert (topology, cached, options) == (TOPOLOGY, False, {})
    assert choice == advice.Choice(2, 4, "block", 8)
    assert precision == zj.Precision(compute="bfloat16", reduce="float32")


def test_the_command_writes_json_and_the_profile(command, tmp_path):
    path = str(tmp_path / "times.pbtxt")
    status, out, _ = command("--json", "--profile-to", path)
    found = json.loads(out)
    assert status == 0 and found["options"][profile.OPTION] == path
    assert found["tried"][0]["name"] == "default" and found["unknown"] == []


def test_the_command_fails_where_nothing_fits(command):
    status, out, _ = command(fits=False)
    assert status == 1 and "no options were accepted" in out and "train_step" not in out


def _init():
    return {"a": jnp.ones((1024, 1024)), "b": jnp.ones((1024, 1024))}


def _loss(p, x):
    y = jnp.square((x @ p["a"]) @ p["b"])
    return zj.Loss(y.sum(), y.size)


RECIPE = zj.Recipe(_init, _loss, optax.sgd(0.1),
                   lambda parts: jax.ShapeDtypeStruct((parts * 8, 1024), "float32"))


@pytest.fixture(scope="module")
def default():
    """The plan of a step that waits for the network, with the compiler's default options."""
    return _planned({})


def _planned(options):
    zero = zj.Zero(zj.make_mesh(topology=TOPOLOGY), precision=tuning.MIXED)
    step = zero.train_step(_loss, RECIPE.tx, compiler_options=options)
    return step.plan(zero.abstract(_init, RECIPE.tx), RECIPE.rows(64))


def _notes(plan, words):
    return [str(finding) for finding in hints.of(plan.reading, plan.memory)
            if words in str(finding)]


def test_a_plan_whose_network_is_exposed_names_the_command(default):
    note, = _notes(default, "zerojax tune")
    assert "of the time of its collectives" in note and note in str(default).replace("\n", " ")
    changed = dataclasses.replace(default.reading, options={OVERLAP: 2})
    assert _notes(dataclasses.replace(default, reading=changed), "zerojax tune") == []


def test_a_plan_whose_network_takes_little_time_does_not(default):
    slow = dataclasses.replace(default.topology.gpu, bandwidth=10**8, network=1e15)
    topology = dataclasses.replace(default.topology, gpu=slow)
    reading = dataclasses.replace(default.reading, topology=topology)
    assert _notes(dataclasses.replace(default, reading=reading), "zerojax tune") == []


@pytest.mark.parametrize("share, noted", [(0.90, False), (0.96, True), (1.01, True)])
def test_a_peak_near_which_the_compiler_rematerializes_is_noted(default, share, noted):
    """The GPU's memory is such that the peak is this share of what the compiler allows itself."""
    figures = default.figures
    fixed = figures["argument"] + figures["output"] - figures["alias"]
    memory = int((fixed + (default.memory.peak / share - fixed) / 0.95) / 0.8)
    gpu = dataclasses.replace(default.topology.gpu, memory=memory)
    topology = dataclasses.replace(default.topology, gpu=gpu)
    near = dataclasses.replace(
        default, reading=dataclasses.replace(default.reading, topology=topology))
    assert len(_notes(near, "MiB at which XLA rematerializes by itself")) == noted
    assert ("memory" in [name for name, _ in tuning.additions(near)]) == noted


@pytest.mark.slow
def test_what_the_compiler_has_rematerialized_is_noted():
    """Below the limit: its estimate of the peak is higher than the compiled one."""
    case = models.language(models.Transformer(remat=False, scanned=False, layers=3))

    def plan(topology):
        zero = zj.Zero(zj.make_mesh(topology=topology), precision=tuning.MIXED)
        step = zero.train_step(case.loss, RECIPE.tx)
        return step.plan(zero.abstract(case.init, RECIPE.tx, *case.example), case.batch(64))

    topology = zj.Topology.parse("h100:1x8")
    before = plan(topology)
    small = dataclasses.replace(topology.gpu, memory=int(before.memory.peak / 0.76))
    after = plan(dataclasses.replace(topology, gpu=small))
    assert _notes(before, "by itself") == []
    note, = _notes(after, "XLA rematerializes by itself")
    assert "instructions) to keep the peak at" in note
    assert after.memory.peak < 0.95 * hints.allowed(after.reading)


@pytest.fixture(scope="module")
def tuned():
    return zj.tune(RECIPE, TOPOLOGY)


@pytest.mark.slow
def test_the_table_fits_80_columns(tuned, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert len(tuned.tried) >= 7 and not tuned.unknown
    table = str(tuned).split("\n\nzero.")[0]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["", "profile"])
def test_the_pasted_line_makes_the_plan_of_the_row(tuned, chosen):
    best = tuned.best
    if chosen:
        best = next(attempt for attempt in tuned.tried if chosen in attempt.name)
    line = dataclasses.replace(tuned, best=best).line
    zero = zj.Zero(zj.make_mesh(topology=TOPOLOGY), precision=tuning.MIXED)
    step = eval(line, {"zero": zero, "loss_fn": _loss, "tx": RECIPE.tx})
    plan = step.plan(zero.abstract(_init, RECIPE.tx), RECIPE.rows(64))
    assert plan.cached and plan.hlo == best.plan.hlo and plan.compute == best.plan.compute
    assert step.compiler_options == best.options


@pytest.mark.slow
def test_a_profile_changes_the_schedule_and_hides_more():
    case = models.CASES["scanned"]()
    zero = zj.Zero(zj.make_mesh(topology=TOPOLOGY), precision=tuning.MIXED)
    state = zero.abstract(case.init, RECIPE.tx, *case.example)

    def plan(options):
        step = zero.train_step(case.loss, RECIPE.tx, compiler_options=options)
        return step.plan(state, case.batch(128))

    apart = plan({REDUCE: 1})
    with_times = plan({REDUCE: 1, profile.OPTION: str(profile.write(apart.runs))})
    assert with_times.sent == apart.sent
    assert with_times.compute.busy["network"] < apart.compute.busy["network"]


@pytest.mark.parametrize("options, error, words", [
    ({"profile_to": "times.txt"}, zj.PolicyError, "ends in .pbtxt"),
    ({"profile_to": "nowhere/times.pbtxt"}, zj.PolicyError, "a folder that exists"),
    ({"remat": "all"}, zj.RecipeError, "no loss 'all'")])
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        zj.tune(RECIPE, TOPOLOGY, **options)


def test_a_recipe_is_needed():
    with pytest.raises(zj.RecipeError, match="tune was given a str"):
        zj.tune("train.py", TOPOLOGY)


def test_a_profile_that_is_not_there_is_refused(tmp_path):
    """XLA would compile without it, on one host of several."""
    zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:1]))
    options = {profile.OPTION: str(tmp_path / "times.pbtxt")}
    with pytest.raises(zj.PolicyError, match=r"no profile '.*times.pbtxt'. Copy the file that"):
        zero.train_step(lambda params, x: x.sum(), optax.sgd(0.1), compiler_options=options)
    (tmp_path / "times.pbtxt").write_text("")
    zero.train_step(lambda params, x: x.sum(), optax.sgd(0.1), compiler_options=options)
