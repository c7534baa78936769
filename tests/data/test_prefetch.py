"""Reading ahead: how far, on which thread, and that the thread ends."""

import gc
import subprocess
import sys
import threading
import weakref

import jax
import numpy as np
import pytest

import zerojax as zj
from zerojax.data.prefetch import Reader

X = np.ones((8, 4), np.float32)


def zero():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]))


class Counted:
    """Says which item was begun last, and on which thread."""

    def __init__(self):
        self.begun, self.threads, self.changed = 0, [], threading.Condition()

    def __call__(self):
        with self.changed:
            self.begun += 1
            self.threads.append(threading.current_thread())
            self.changed.notify_all()
            return self.begun

    def reaches(self, n, seconds=30.0):
        with self.changed:
            return self.changed.wait_for(lambda: self.begun >= n, seconds)


def test_so_many_are_made_before_they_are_taken():
    made = Counted()
    reader = Reader(made, ahead=2)
    assert not made.reaches(1, 0.2), "none before the first is asked for"
    assert reader.take() == 1
    assert made.reaches(3) and not made.reaches(4, 0.2)
    assert [reader.take(), reader.take()] == [2, 3]
    assert made.reaches(5) and not made.reaches(6, 0.2)
    reader.close()
    assert threading.current_thread() not in made.threads and not made.threads[0].is_alive()


def test_none_are_made_ahead_without_a_thread():
    made = Counted()
    reader = Reader(made, ahead=0)
    assert made.begun == 0 and reader.take() == 1 and made.threads == [threading.current_thread()]


def test_the_thread_ends_with_its_reader():
    made = Counted()
    reader = Reader(made, ahead=1)
    assert reader.take() == 1 and made.reaches(2)
    gone = weakref.ref(reader)
    del reader
    gc.collect()
    made.threads[0].join(30)
    assert gone() is None and not made.threads[0].is_alive()


def test_an_error_comes_in_its_turn_and_stays():
    reader = Reader(iter([1, 2]).__next__, ahead=5)
    assert [reader.take(), reader.take()] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            reader.take()


def test_a_feed_reads_ahead_and_stays_ended():
    fed = zj.feed([X, X], zero())
    assert len(list(fed)) == 2
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(fed)
    fed = zj.feed([X, X[:3]], zero())
    next(fed)
    for _ in range(2):
        with pytest.raises(zj.BatchError, match="3 examples"):
            next(fed)


def test_the_thread_ends_with_the_batches():
    """Also after an error, whose traceback holds on to what raised it."""
    ours = lambda: {t for t in threading.enumerate() if t.name == "zerojax feed"}
    before = ours()
    for batches in ([X, X], [X, X[:3]]):
        fed = zj.feed(batches, zero())
        with pytest.raises((StopIteration, zj.BatchError)):
            while True:
                next(fed)
        for thread in ours() - before:
            thread.join(30)
    assert not ours() - before


def test_the_thread_has_the_callers_64_bits():
    with jax.enable_x64(True):
        (batch,) = zj.feed([np.ones((8, 4))], zero())
    assert batch.dtype == np.float64


def test_a_source_that_is_stuck_does_not_keep_the_process():
    code = ("import threading, jax, numpy as np, zerojax as zj\n"
            "def stuck():\n    yield np.ones((8, 4), np.float32)\n    threading.Event().wait()\n"
            "fed = zj.feed(stuck(), zj.Zero(zj.make_mesh()))\nprint(next(fed).shape)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "(8, 4)\n", done.stderr


def test_padding_keeps_the_position_and_the_weight():
    source = zj.Indexed(lambda i: X[:(8, 8, 5)[i]] * i, stop=3)
    fed = zj.feed(source, zero(), pad=True)
    sums = [(float((x[:, 0] * w).sum()), float(w.sum()), fed.get_state()["next"]) for x, w in fed]
    assert sums == [(0, 8, 1), (8, 8, 2), (10, 5, 3)]
    fed.set_state({"next": 1})
    assert [float(w.sum()) for _, w in fed] == [8, 5]


def test_padding_to_a_number_does_not_need_the_first_batch():
    fed = zj.feed(zj.Indexed(lambda i: X[:(8, 8, 5)[i]], stop=3), zero(), pad=8)
    fed.set_state({"next": 2})
    (batch, weight), = fed
    assert batch.shape == (8, 4) and float(weight.sum()) == 5
    with pytest.raises(zj.BatchError, match="8 examples can't be filled up to 4"):
        next(zj.feed([X], zj.Zero(zj.make_mesh(devices=jax.devices()[:4])), pad=4))
