"""Each process's own part of a batch, and sources that differ between processes."""

import json
import re

import pytest
from processes import HERE, Job

SUM = 2 * sum(range(8))  # of rows(8), which has two columns
NONE = ("", "")


def both(pattern):
    return (pattern, pattern)


def differ(first, second, batch=0, more=""):
    """Returns the pattern of the error, on both processes, of arrays that differ."""
    arrays = f"array: {first} on process 0; {second} on process 1"
    return both(f"BatchError: batch {batch}: .*{arrays}{more}")


F8 = r"float32\[8, 2\]"
EXPECTED = {  # sums of the batches of all processes, weights, patterns of the error of each
    "alike": ([SUM + 2 * sum(range(16, 24)), 2 * sum(range(8, 16)) + 2 * sum(range(24, 32))], [],
              NONE),
    "shorter on one": ([2 * SUM] * 2, [], NONE),
    "uneven": ([2 * SUM], [], differ(F8, r"float32\[4, 2\]", batch=1, more=".*pad=True")),
    "does not divide": ([2 * SUM], [], (
        "ClusterError: batch 1 could not be made on process 1, whose log has the reason",
        r"BatchError: batch has 6 examples \(shape \(6, 2\)\), which do not divide evenly over the "
        "4 devices of process 1")),
    "other shape": ([], [], differ(F8, r"float32\[8, 3\]")),
    "other tree": ([], [], differ(F8, "nothing")),
    "other dtype": ([], [], differ(F8, r"int32\[8, 2\]")),
    "broken": ([2 * SUM], [], ("ClusterError: batch 1 could not be made on process 1",
                               "OSError: disk gone")),
    "nothing": ([], [], NONE),
    "padded": ([72, 42, 1], [16, 11, 1], NONE),
    "padded, nothing": ([], [], both("BatchError: process 1 brought no batch at all")),
    "padded, larger": ([12], [8],
                       both("BatchError: a batch of 8 examples cannot be padded to 4")),
    "padded, unlike": ([], [], both(rf"BatchError: batch 0: .*0: {F8} on process 0; "
                                    r"float32\[4, 2\] on process 1")),
    "shared": ([2 * sum(range(4))] * 3, [], NONE),
    "shared, unlike": ([], [], both("BatchError: batch 0: the devices of processes 0 and 1 hold "
                                    "the same examples, but these")),
    "own array": ([], [], both("is an array of process . alone, but 2 processes train together; "
                               "give the share of each process to zj.feed")),
    "of a loop": ([], [], both("is an array of process . alone")),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each process, by case and number of batches read ahead."""
    with Job(tmp_path_factory.mktemp("feeding"), [HERE / "feeding.py"], 2, 4) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
        lines = [[line for line in p.out.splitlines() if line.startswith('["')] for p in job]
    return [{name: rest for name, *rest in map(json.loads, own)} for own in lines]


@pytest.mark.parametrize("name", EXPECTED)
def test_all_processes_end_together(results, name):
    sums, weights, errors = EXPECTED[name]
    for process, pattern in enumerate(errors):
        found = results[process]
        for case in [name] if name in found else [f"{name}/0", f"{name}/2"]:
            *numbers, error = found[case]
            assert numbers == [sums, weights], case
            text = error.replace("\n", " ")
            assert re.search(pattern, text) if pattern else not error, error
