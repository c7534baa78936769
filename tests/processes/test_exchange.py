"""Groups of processes: the group of one, and errors of a group whose words a test provides."""

import dataclasses
import json
import types

import jax
import pytest

import zerojax as zj
from zerojax.processes import agreement, exchange


@dataclasses.dataclass(frozen=True)
class Scripted(exchange.Group):
    """A group whose other process, number 1, sends a given value."""

    devices: tuple = ()
    other: object = None

    def texts(self, mine):
        return {0: mine, 1: json.dumps(self.other)}


def test_alone_nothing_is_sent(lowerings):
    alone = exchange.everyone()
    sent = alone.send([1, 2])
    assert alone == exchange.Alone() == exchange.of_mesh(zj.make_mesh()) and alone.size == 1
    assert [words.tolist() for words in alone.received(sent).values()] == [[1, 2]]
    assert alone.shared({"text": "é"}) == {0: {"text": "é"}} and alone.texts("") == {0: ""}
    assert alone.of_first([3]) == [3] and alone.first
    agreement.check(alone, "here", {"a": 1})
    assert lowerings == []


def test_an_absent_mesh_has_nobody_to_agree_with():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    assert exchange.of_mesh() == exchange.of_mesh(mesh) == exchange.Alone()


@pytest.mark.parametrize("call", [lambda group: group.words([1]), lambda group: group.send([1]),
                                  lambda group: group.calling("step")])
def test_a_process_outside_the_mesh(call, monkeypatch):
    """Otherwise it would wait in a collective without it, or look like one that was killed."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for processes, words in (((1, 2), "processes 1-2"), ((1,), "process 1")):
        devices = [types.SimpleNamespace(process_index=process, id=7) for process in processes]
        with pytest.raises(zj.ClusterError, match="process 0 has no device in the mesh, whose "
                                                  f"devices are those of {words}; only these may"):
            call(exchange._group(devices))


def fail(kind):
    raise kind("no")


@pytest.mark.parametrize("group", [exchange.Alone(), Scripted()], ids=["one process", "two"])
def test_an_error_of_this_process_is_its_own(group):
    assert group.everywhere(lambda: 5) == 5
    with pytest.raises(KeyError, match=r"^'no'$"):
        group.everywhere(lambda: fail(KeyError), [OSError])


@pytest.mark.parametrize("own, other, kind, text", [
    (None, [2, "KeyError: 'x'"], zj.ClusterError,
     "process 1 of 2 failed; process 1 reports: KeyError: 'x'"),
    (None, [1, "OSError: x"], OSError, "process 1 of 2 failed; process 1 reports: OSError: x"),
    (KeyError, [1, "OSError: x"], OSError,
     "processes 0-1 of 2 failed; process 1 reports: OSError: x"),
    (ValueError, [1, "OSError: x"], ValueError, "no"),
], ids=["unlisted", "listed", "worse than mine", "mine is the worst"])
def test_the_worst_kind_is_raised_on_all(own, other, kind, text):
    act = (lambda: fail(own)) if own else (lambda: 5)
    with pytest.raises(kind) as caught:
        Scripted(other=other).everywhere(act, [ValueError, OSError])
    assert str(caught.value) == text


def test_fields_that_differ():
    """At most ten are named, each value with its processes, and long values are cut."""
    fields = {process: {"same": 1, "of": {f"field {i}": process // 2 for i in range(12)}}
              for process in range(4)}
    lines = agreement.difference(fields).splitlines()
    assert lines[0] == "the processes differ, and would not run the same program:"
    assert lines[1] == "  of.field 0: 0 on processes 0-1; 1 on processes 2-3"
    assert len(lines) == 12 and lines[-1] == "  and 2 more fields"
    text = agreement.difference({0: {"a": "x" * 300}, 1: {}})
    assert text.endswith(f"a: {'x' * 200}... on process 0; nothing on process 1")
