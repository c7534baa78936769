"""Several processes on this machine: what gloo costs beside one process, what reading ahead hides, and what the start takes.

    python benchmarks/hosts.py          # the tables
    python benchmarks/hosts.py MODE     # what each process of one of them runs: steps, feed or start; process 0 prints JSON
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import machine

ROOT = pathlib.Path(__file__).parent.parent
STEPS, ROUNDS, SHARE = 12, 5, 0.8
MARK = "figures: "


def gpt_step():
    """(policy, step, state, the process's part of batch i) of the example's GPT."""
    sys.path.insert(0, str(ROOT / "examples"))
    import multihost_gpt
    import train_gpt as gpt

    import zerojax as zj

    zero, tx = zj.Zero(zj.make_mesh(), 3, min_shard=2**10), gpt.optimizer(1000)
    text, _ = gpt.read_text()
    step = zero.train_step(gpt.loss_fn, tx)
    return zero, step, zero.init(gpt.init, tx), multihost_gpt.own_part(zero, text, 32, 0, None).make


def taken(step, state, batches, n):
    """Seconds of each step, from one batch to the next; the device's work is waited for."""
    times, start = [], time.perf_counter()
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
    """The step's time with a source that costs nothing, and one that takes a share of it, read ahead or not; in turn."""
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

    feeds = {"free": first, "ahead": zj.feed(zj.Indexed(slow), zero), "not ahead": zj.feed(zj.Indexed(slow), zero, prefetch=0)}
    all_times = {name: [] for name in feeds}
    for _ in range(ROUNDS):
        for name, batches in feeds.items():
            times, state = taken(step, state, batches, STEPS)
            all_times[name] += times[2:]
    return {name: sum(t) / len(t) for name, t in all_times.items()}


def start():
    """Seconds of what comes before the first compilation."""
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
    exchange.words(exchange.devices_of(zero.mesh), [0] * 8)
    times = []
    for _ in range(5):
        at = time.perf_counter()
        agreement.check(exchange.devices_of(zero.mesh), "benchmark", {"a": 1})
        times.append(time.perf_counter() - at)
    traced = time.perf_counter()
    step.lower(state, batch)
    lowered = time.perf_counter()
    exchange.words(exchange.devices_of(zero.mesh), [0] * 8)  # all are here: their waiting for each other is no cost of what follows
    together = time.perf_counter()
    step._agreed(zero, "train_step", lambda: step._fields(state, batch))
    return {"initialize": joined - began, "devices": devices - joined, "check": median(times),
            "tracing": lowered - traced, "agreement of the step": time.perf_counter() - together}


MODES = {"steps": steps, "feed": feed, "start": start}


def run(mode, processes, devices) -> dict:
    """What process 0 of a job found."""
    command = [sys.executable, "-m", "zerojax", "launch", "-n", str(processes), "--devices", str(devices), __file__, mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)
    found = [line.split(MARK, 1)[1] for line in done.stdout.splitlines() if line.startswith(f"[0] {MARK}")]
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(found[0])


def markdown() -> str:
    one, two = run("steps", 1, 8)["seconds"], run("steps", 2, 4)["seconds"]
    rows = [("1 process x 8 devices", f"{1 / one:.1f}", "1"),
            ("2 processes x 4 devices, over gloo", f"{1 / two:.1f}", f"{two / one:.2f}")]
    text = "The GPT of `examples/multihost_gpt.py`, stage 3, 32 sequences a step.\n\n"
    text += machine.table(["", "steps/s", "time of a step, ratio"], rows)
    fed = {name: run("feed", *shape) for name, shape in {"1 x 8": (1, 8), "2 x 4": (2, 4)}.items()}
    rows = [(name, f"{t['free'] * 1e3:.0f} ms", f"{t['ahead'] / t['free']:.3f}", f"{t['not ahead'] / t['free']:.2f}", "1.05")
            for name, t in fed.items()]
    text += f"\nA source that takes {SHARE} of a step, waiting (as for a disk), with `zj.feed`:\n\n"
    text += machine.table(["processes x devices", "step with a source that costs nothing", "read ahead, ratio", "prefetch=0, ratio",
                           "aim of reading ahead"], rows)
    began = run("start", 8, 1)
    text += f"\nThe start of 8 processes on {os.cpu_count()} cores, process 0, in seconds (the aim of an agreement: 0.2):\n\n"
    return text + machine.table(["", "s"], [(name, f"{s:.3f}") for name, s in began.items()])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(markdown())
    else:
        print(f"{MARK}{json.dumps(MODES[sys.argv[1]]())}", flush=True)
