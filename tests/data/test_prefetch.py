"""Prefetching: how far ahead, on which thread, and when the thread ends."""

import atexit
import gc
import importlib.util
import subprocess
import sys
import threading
import weakref

import jax
import numpy as np
import pytest

import zerojax as zj
from zerojax.data import prefetch
from zerojax.data.prefetch import Prefetcher

X = np.ones((8, 4), np.float32)


def zero():
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:8]))


class Counted:
    """A function that returns 1, 2, ..., and records its calls and their threads."""

    def __init__(self):
        self.begun = 0
        self.threads = []
        self.changed = threading.Condition()

    def __call__(self):
        with self.changed:
            self.begun += 1
            self.threads.append(threading.current_thread())
            self.changed.notify_all()
            return self.begun

    def reaches(self, n, seconds=30.0):
        """Whether call `n` begins within some seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self.begun >= n, seconds)


def test_results_are_made_ahead_up_to_the_number():
    made = Counted()
    prefetcher = Prefetcher(made, ahead=2)
    assert not made.reaches(1, 0.2), "no call before the first take"
    assert prefetcher.take() == 1
    assert made.reaches(3) and not made.reaches(4, 0.2)
    assert [prefetcher.take(), prefetcher.take()] == [2, 3]
    assert made.reaches(5) and not made.reaches(6, 0.2)
    prefetcher.close()
    assert threading.current_thread() not in made.threads and not made.threads[0].is_alive()


def test_with_0_ahead_there_is_no_thread():
    made = Counted()
    prefetcher = Prefetcher(made, ahead=0)
    assert made.begun == 0
    assert prefetcher.take() == 1 and made.threads == [threading.current_thread()]


def test_the_thread_ends_with_its_prefetcher():
    made = Counted()
    prefetcher = Prefetcher(made, ahead=1)
    assert prefetcher.take() == 1 and made.reaches(2)
    gone = weakref.ref(prefetcher)
    del prefetcher
    gc.collect()
    made.threads[0].join(30)
    assert gone() is None and not made.threads[0].is_alive()


def test_an_error_is_raised_in_its_turn_and_again():
    prefetcher = Prefetcher(iter([1, 2]).__next__, ahead=5)
    assert [prefetcher.take(), prefetcher.take()] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            prefetcher.take()


def test_importing_registers_nothing_at_exit(monkeypatch):
    """The first thread does, and only the first."""
    registered, register = [], atexit.register

    def record(function, *arguments):
        if function.__module__ == prefetch.__name__:
            registered.append(function)
        else:
            register(function, *arguments)

    monkeypatch.setattr(atexit, "register", record)
    spec = importlib.util.find_spec(prefetch.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert registered == []
    prefetchers = [fresh.Prefetcher(Counted(), ahead=1) for _ in range(2)]
    assert [prefetcher.take() for prefetcher in prefetchers] == [1, 1]
    stop_all, = registered
    stop_all()
    assert not any(worker.thread.is_alive() for worker in fresh._workers)


def test_a_feed_stays_ended_after_its_last_batch_or_an_error():
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
    """It also ends after an error, whose traceback refers to the feed."""

    def ours():
        return {thread for thread in threading.enumerate() if thread.name == "zerojax feed"}

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
    code = """
import threading
import numpy as np
import zerojax as zj

def stuck():
    yield np.ones((8, 4), np.float32)
    threading.Event().wait()

print(next(zj.feed(stuck(), zj.Zero(zj.make_mesh()))).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "(8, 4)\n", done.stderr


def test_padding_keeps_the_position_and_the_weight():
    source = zj.Indexed(lambda i: X[:(8, 8, 5)[i]] * i, stop=3)
    fed = zj.feed(source, zero(), pad=True)
    found = [(float((x[:, 0] * weight).sum()), float(weight.sum()), fed.get_state()["next"])
             for x, weight in fed]
    assert found == [(0, 8, 1), (8, 8, 2), (10, 5, 3)]
    fed.set_state({"next": 1})
    assert [float(weight.sum()) for _, weight in fed] == [8, 5]


def test_padding_to_a_number_does_not_need_the_first_batch():
    fed = zj.feed(zj.Indexed(lambda i: X[:(8, 8, 5)[i]], stop=3), zero(), pad=8)
    fed.set_state({"next": 2})
    (batch, weight), = fed
    assert batch.shape == (8, 4) and float(weight.sum()) == 5
    with pytest.raises(zj.BatchError, match="8 examples cannot be padded to 4, as pad=4 asks"):
        next(zj.feed([X], zj.Zero(zj.make_mesh(devices=jax.devices()[:4])), pad=4))
