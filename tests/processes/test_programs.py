"""The first line in which programs differ, found by processes that exchange digests."""

import concurrent.futures
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.processes import agreement, exchange
from zerojax.processes.programs import Program, first_difference

X = np.ones((4, 4), np.float32)
HERE = pathlib.Path(__file__).read_text().splitlines()


class Thread(exchange.Group):
    """One of several threads that exchange words as processes do."""

    def __init__(self, process, board, barrier):
        super().__init__(())
        vars(self).update(index=process, board=board, barrier=barrier, calls=0)

    def words(self, mine):
        vars(self)["calls"] += 1
        self.board[self.index] = np.asarray(mine, np.uint32)
        self.barrier.wait(10)
        everyone = dict(sorted(self.board.items()))
        self.barrier.wait(10)
        return everyone


def together(call, *of_each):
    """Returns the groups, and what `call(group, item)` returns for the item of each process."""
    board, barrier = {}, threading.Barrier(len(of_each))
    groups = [Thread(i, board, barrier) for i in range(len(of_each))]
    with concurrent.futures.ThreadPoolExecutor(len(of_each)) as pool:
        return groups, list(pool.map(call, groups, of_each))


def program(fn, *args):
    return Program.of(jax.jit(fn).lower(*args or [X]))


class Text:
    """A lowered program that is only text."""

    def __init__(self, text):
        self.text = text

    def as_text(self, debug_info=False):
        return self.text


def differing(*programs):
    _, results = together(first_difference, *programs)
    assert all(result == results[0] for result in results)
    return results[0]


def line_of(text):
    return next(i for i, line in enumerate(HERE, 1) if text in line)


def test_an_operation_and_its_place():
    first, second = (program(lambda x, fn=fn: fn(x + 1))  # here
                     for fn in (jnp.tanh, jnp.sin))
    line, texts = differing(first, second, first)
    place = f"test_programs.py:{line_of('# here')}"
    assert "tanh" in first.lines[line]
    for i, name in enumerate(("tanh", "sine", "tanh")):
        assert texts[i].startswith(f"`%2 = stablehlo.{name} ") and texts[i].endswith(f"at {place}")


def looped(x, fn):
    return jax.lax.fori_loop(0, 3, lambda i, y: fn(y), x)  # the loop


@pytest.mark.parametrize("name, function, mark", [
    ("a constant", lambda scale: lambda x: jnp.tanh(x) * scale, "jnp.tanh(x) * scale, "),
    ("a constant in a loop", lambda scale: lambda x: looped(x, lambda y: y * scale), "y * scale)"),
    ("the number of rounds", lambda n: lambda x: jax.lax.fori_loop(
        0, int(n), lambda i, y: y + 1, x), "lambda n: lambda x"),
])
def test_a_constant_comes_from_its_use(name, function, mark):
    _, texts = differing(program(function(2.0)), program(function(3.0)))
    start = line_of(mark)
    places = [text.rpartition("test_programs.py:")[2] for text in texts.values()]
    assert len(set(places)) == 1 and start <= int(places[0]) <= start + 1, texts
    assert all("dense<" in text for text in texts.values()), texts


def test_a_large_constant_is_shortened_around_the_difference():
    value = np.arange(4096, dtype=np.float32)
    other = value.copy()
    other[4000] += 0.5
    programs = [program(lambda x, c=c: x + c, value) for c in (value, other)]
    _, texts = differing(*programs)
    assert texts[0] != texts[1] and all(len(text) < 160 for text in texts.values())
    assert all("stablehlo.constant dense<" in text for text in texts.values())


def test_a_program_that_is_the_beginning_of_another():
    line, texts = differing(Program.of(Text("a\nb\n")), Program.of(Text("a\nb\nc\n")))
    assert (line, texts) == (2, {0: "the end, after 2 lines", 1: "`c`"})


def test_every_line_can_be_the_first_that_differs():
    lines = [f"line {i}\n" for i in range(7)]
    for i in range(7):
        other = [*lines[:i], "other\n", *lines[i + 1:]]
        found, _ = differing(Program.of(Text("".join(lines))), Program.of(Text("".join(other))))
        assert found == i


def test_directories_of_the_source_are_not_part_of_a_program():
    def at(directory):
        code = compile("def fn(x):\n    return x + 1\n", f"/{directory}/train.py", "exec")
        exec(code, names := {})
        return program(names["fn"])

    first, second = at("home/a"), at("b")
    debug = [each.lowered.as_text(debug_info=True) for each in (first, second)]
    assert "/home/a/train.py" in debug[0] and debug[0] != debug[1]
    assert first == second and first.place(2) == second.place(2) == "train.py:2"


def test_an_agreement_costs_one_exchange_and_a_difference_names_the_line():
    def check(group, fields):
        try:
            return agreement.check(group, "step", fields)
        except agreement.ClusterError as error:
            return str(error)

    one, two = program(lambda x: x + 1), program(lambda x: x - 1)
    groups, errors = together(check, {"program": one}, {"program": one})
    assert errors[0] == errors[1] and len(errors[0]) == 64  # a digest
    assert [group.calls for group in groups] == [1, 1]
    _, errors = together(check, {"program": one, "average": one}, {"program": two})
    assert errors[0] == errors[1]
    line = next(i for i, text in enumerate(one.lines, 1) if "stablehlo.add" in text)
    assert f"\n  program, line {line}: `%1 = stablehlo.add" in errors[0]
    assert "\n  average: 8 lines, " in errors[0] and "; nothing on process 1" in errors[0]
