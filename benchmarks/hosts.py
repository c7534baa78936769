"""Several processes on this machine: the cost of gloo, the effect of prefetching, and the startup.

    python benchmarks/hosts.py          # the tables
    python benchmarks/hosts.py MODE     # one process of a table; MODE is steps, feed or start

In the second form, process 0 prints its figures as JSON.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import machine

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12
ROUNDS = 5
SHARE = 0.8  # the time of the slow source for a batch, as a share of a step's time
MARK = "figures: "


def gpt_step():
    """Returns policy, step and state of the example's GPT, and a function from i to batch i.

    The function returns this process's part of the batch.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    import multihost_gpt
    import train_gpt as gpt

    import zerojax as zj

    zero = zj.Zero(zj.make_mesh(), 3, min_shard=2**10)
    tx = gpt.optimizer(1000)
    text, _ = gpt.read_text()
    step = zero.train_step(gpt.loss_fn, tx)
    return zero, step, zero.init(gpt.init, tx), multihost_gpt.own_part(zero, text, 32, 0, None).make


def taken(step, state, batches, n):
    """Runs n steps and waits for each; returns the seconds of each step with its batch."""
    times = []
    start = time.perf_counter()
    for _ in range(n):
        state, metrics = step(state, next(batches))
        float(metrics["loss"])
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times, state


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def steps():
    import zerojax as zj

    zj.initialize()
    zero, step, state, make = gpt_step()
    batches = zj.feed(zj.Indexed(make), zero)
    _, state = taken(step, state, batches, 5)
    return {"seconds": median(taken(step, state, batches, 60)[0])}


def feed():
    """Returns the seconds of a step with each of three sources, which take turns.

    The sources are a free one, a slow one with prefetch, and a slow one without.
    """
    import zerojax as zj

    zj.initialize()
    zero, step, state, make = gpt_step()
    part = make(0)
    first = zj.feed(zj.Indexed(lambda i: part), zero)
    _, state = taken(step, state, first, 5)
    times, state = taken(step, state, first, 3 * STEPS)
    alone = median(times)

    def slow(i):
        time.sleep(SHARE * alone)
        return part

    feeds = {"free": first, "prefetch": zj.feed(zj.Indexed(slow), zero),
             "no prefetch": zj.feed(zj.Indexed(slow), zero, prefetch=0)}
    all_times = {name: [] for name in feeds}
    for _ in range(ROUNDS):
        for name, batches in feeds.items():
            times, state = taken(step, state, batches, STEPS)
            all_times[name] += times[2:]
    return {name: sum(t) / len(t) for name, t in all_times.items()}


def start():
    """Returns the seconds of each phase before the first compilation."""
    import jax

    import zerojax as zj
    from zerojax.processes import agreement, exchange

    began = time.perf_counter()
    zj.initialize()
    joined = time.perf_counter()

    jax.devices()
    devices = time.perf_counter()
    zero, step, state, make = gpt_step()
    batch = next(zj.feed(zj.Indexed(make), zero))
    exchange.of_mesh(zero.mesh).words([0] * 8)
    times = []
    for _ in range(5):
        at = time.perf_counter()
        agreement.check(exchange.of_mesh(zero.mesh), "benchmark", {"a": 1})
        times.append(time.perf_counter() - at)
    traced = time.perf_counter()
    step.lower(state, batch)
    lowered = time.perf_counter()
    # a barrier, so that waiting for other processes does not count in the next phase
    exchange.of_mesh(zero.mesh).words([0] * 8)
    together = time.perf_counter()
    step._preflight(state, (batch,), batch=batch, fields=lambda state: step._fields(state, batch))
    return {"initialize": joined - began, "devices": devices - joined, "check": median(times),
            "tracing": lowered - traced, "agreement on the step": time.perf_counter() - together}


MODES = {"steps": steps, "feed": feed, "start": start}


def run(mode, processes, devices) -> dict:
    """Launches a job and returns the figures of its process 0."""
    command = [sys.executable, "-m", "zerojax", "launch", "-n", str(processes),
               "--devices", str(devices), __file__, mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)
    found = [line.split(MARK, 1)[1] for line in done.stdout.splitlines()
             if line.startswith(f"[0] {MARK}")]
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(found[0])


def markdown() -> str:
    return f"{_gloo()}\n{_prefetch()}\n{_startup()}"


def _gloo() -> str:
    one = run("steps", 1, 8)["seconds"]
    two = run("steps", 2, 4)["seconds"]
    rows = [("1 process x 8 devices", f"{1 / one:.1f}", "1"),
            ("2 processes x 4 devices, over gloo", f"{1 / two:.1f}", f"{two / one:.2f}")]
    text = "The GPT of `examples/multihost_gpt.py`, stage 3, 32 sequences per step.\n\n"
    return text + machine.table(["", "steps/s", "step time, ratio"], rows)


def _prefetch() -> str:
    fed = {name: run("feed", *shape) for name, shape in {"1 x 8": (1, 8), "2 x 4": (2, 4)}.items()}
    rows = [(name, f"{t['free'] * 1e3:.0f} ms", f"{t['prefetch'] / t['free']:.3f}",
             f"{t['no prefetch'] / t['free']:.2f}", "1.05") for name, t in fed.items()]
    text = (f"`zj.feed` with a source that waits for {SHARE} of a step per batch, as a disk "
            "would:\n\n")
    return text + machine.table(["processes x devices", "step time with a free source",
                                 "with prefetch, ratio", "with prefetch=0, ratio",
                                 "aim with prefetch"], rows)


def _startup() -> str:
    began = run("start", 8, 1)
    text = (f"Startup of 8 processes on {os.cpu_count()} cores, in seconds of process 0 "
            "(aim of an agreement: 0.2):\n\n")
    return text + machine.table(["", "s"], [(name, f"{s:.3f}") for name, s in began.items()])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(markdown())
    else:
        print(f"{MARK}{json.dumps(MODES[sys.argv[1]]())}", flush=True)
