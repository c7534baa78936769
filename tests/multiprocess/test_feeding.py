"""Each process's own part of a batch, and sources that are not alike (fault 22)."""

import json
import re

import pytest
from processes import HERE, Job

S8 = 2 * sum(range(8))  # of rows(8), two columns
WANTED = {  # sums of what all processes hold, weights, error on the first and on the second
    "alike": ([2 * sum(range(8)) + 2 * sum(range(16, 24)), 2 * sum(range(8, 16)) + 2 * sum(range(24, 32))], [], "", ""),
    "shorter on one": ([2 * S8] * 2, [], "", ""),
    "uneven": ([2 * S8], [],
               *[r"BatchError: batch 1: .*array: float32\[8, 2\] on process 0; float32\[4, 2\] on process 1.*pad=True"] * 2),
    "does not divide": ([2 * S8], [], "ClusterError: batch 1 could not be made on process 1, whose log says why",
                        r"BatchError: batch has 6 examples \(shape \(6, 2\)\), which do not divide by the 4 devices of process 1"),
    "other shape": ([], [], *[r"BatchError: batch 0: .*array: float32\[8, 2\] on process 0; float32\[8, 3\] on process 1"] * 2),
    "other tree": ([], [], *[r"BatchError: .*array: float32\[8, 2\] on process 0; nothing on process 1"] * 2),
    "other dtype": ([], [], *[r"BatchError: .*float32\[8, 2\] on process 0; int32\[8, 2\] on process 1"] * 2),
    "broken": ([2 * S8], [], "ClusterError: batch 1 could not be made on process 1", "OSError: disk gone"),
    "nothing": ([], [], "", ""),
    "padded": ([72, 42, 1], [16, 11, 1], "", ""),
    "padded, nothing": ([], [], *["BatchError: process 1 has no batch at all"] * 2),
    "padded, larger": ([12], [8], *["BatchError: a batch of 8 examples can't be filled up to 4"] * 2),
    "padded, unlike": ([], [], *[r"BatchError: batch 0: .*0: float32\[8, 2\] on process 0; float32\[4, 2\] on process 1"] * 2),
    "shared": ([2 * sum(range(4))] * 3, [], "", ""),
    "shared, unlike": ([], [], *["BatchError: batch 0: the devices of processes 0 and 1 hold the same examples, but they"] * 2),
    "own array": ([], [], *["is an array of process . alone, but 2 processes train together; give each's part to zj.feed"] * 2),
    "of a loop": ([], [], *["is an array of process . alone"] * 2),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By case and number of batches read ahead, what each process came to."""
    with Job(tmp_path_factory.mktemp("feeding"), [HERE / "feeding.py"], 2, 4) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
        lines = [[json.loads(line) for line in p.out.splitlines() if line.startswith("[\"")] for p in job]
    return [{name: rest for name, *rest in of} for of in lines]


@pytest.mark.parametrize("name", WANTED)
def test_all_processes_end_together(said, name):
    sums, weights, *errors = WANTED[name]
    for process, error in enumerate(errors):
        for case in [name] if name in said[0] else [f"{name}/0", f"{name}/2"]:
            got_sums, got_weights, got_error = said[process][case]
            assert (got_sums, got_weights) == (sums, weights), case
            assert re.search(error, got_error.replace("\n", " ")) if error else not got_error, got_error
