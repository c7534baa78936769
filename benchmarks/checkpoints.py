"""Saving and restoring a gigabyte over eight CPU devices, beside Orbax alone: times in turn in one process, memory in others.

    python benchmarks/checkpoints.py                        # both tables
    python benchmarks/checkpoints.py OPERATION DIRECTORY    # the peak of one operation, in MiB
"""

import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from machine import seconds, table

import zerojax as zj
from zerojax.checkpoint import digest

LEAVES, SHAPE = 21, (2048, 2048)  # with Adam's two momenta: 1.06 GB
GB = LEAVES * 3 * 4 * SHAPE[0] * SHAPE[1] / 1e9
ROUNDS = 9


def init(key):
    return {f"layer_{i:02}": jax.random.normal(k, SHAPE) for i, k in enumerate(jax.random.split(key, LEAVES))}


def zero(devices=8, stage=3):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:devices]), stage)


def filled(policy):
    """A state whose momenta are not zeros, which would compress to nothing."""
    state = policy.init(init, optax.adam(1e-3), jax.random.key(0))
    adam, *rest = state.opt_state
    adam = adam._replace(mu=jax.tree.map(lambda p: p * 1.1, state.params), nu=jax.tree.map(jax.numpy.square, state.params))
    return jax.block_until_ready(state.replace(opt_state=(adam, *rest)))


def target(policy):
    return policy.abstract(init, optax.adam(1e-3), jax.random.key(0))


class Plain:
    """Orbax with its defaults. It has no words for keys: theirs are saved as data."""

    def __init__(self, directory):
        self.manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=1))
        self.wait = self.manager.wait_until_finished

    def save(self, state):
        item = state.replace(rng=jax.random.key_data(state.rng))
        self.manager.save(int(state.step), args=ocp.args.PyTreeSave(item), force=True)

    def restore(self, step, target):
        item = target.replace(rng=jax.eval_shape(jax.random.key_data, target.rng))
        args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding or target.step.sharding, global_shape=x.shape,
                                                           dtype=x.dtype), item)
        return self.manager.restore(step, args=ocp.args.PyTreeRestore(item, args))


class Ours:
    def __init__(self, directory):
        self.checkpoints = zj.Checkpointer(directory, keep=1)
        self.wait, self.save = self.checkpoints.wait, self.checkpoints.save

    def restore(self, step, target):
        return self.checkpoints.restore(step, target).state


def numbered(state):
    """The state under one step after the other."""
    while True:
        state = state.replace(step=state.step + 1)
        yield jax.block_until_ready(state)


def save_times(both, state):
    """Median seconds of (all of a save, what the loop waits for) of each, taken in turn."""
    states, blocked = numbered(state), {name: [] for name in both}

    def save(name):
        def run():
            start = time.perf_counter()
            both[name].save(next(states))
            blocked[name].append(time.perf_counter() - start)
            both[name].wait()
        return run

    runs = [save(name) for name in both]
    seconds(runs, 1)  # compiles
    whole = seconds(runs, ROUNDS)
    return whole, [float(np.median(blocked[name][1:])) for name in both]


def restore_times(both, steps, policy, rounds=ROUNDS):
    runs = [lambda name=name: jax.block_until_ready(both[name].restore(steps[name], target(policy))) for name in both]
    seconds(runs, 1)
    return seconds(runs, rounds)


def times(directory) -> str:
    both = {"plain": Plain(f"{directory}/plain"), "ours": Ours(f"{directory}/ours")}
    state = filled(zero())
    whole, blocked = save_times(both, state)
    steps = {"plain": both["plain"].manager.latest_step(), "ours": both["ours"].checkpoints.steps()[-1]}
    host = [np.asarray(x).view(np.uint32) for x in jax.tree.leaves(state.params) + jax.tree.leaves(state.opt_state[0][1:])]
    marks, plain_sum = seconds([lambda: digest.of(jax.tree.leaves(state)), lambda: [x.sum(dtype=np.uint32) for x in host]], ROUNDS)
    same = restore_times(both, steps, zero())
    rows = [("save, all of it", *whole, "1.10"), ("restore onto the same mesh", *same, "1.10"),
            ("restore onto 4 devices", *restore_times(both, steps, zero(4)), ""),
            ("restore onto 1 device", *restore_times(both, steps, zero(1)), ""),
            ("restore at stage 0, a copy on each of 8", *restore_times(both, steps, zero(8, 0), 3), "")]
    block = ("save, what the loop waits for", *blocked, f"1.05 + {marks / blocked[0]:.2f} of the digest")
    lines = [(name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}", aim) for name, a, b, aim in [rows[0], block, *rows[1:]]]
    others = max(b / same[1] for name, _, b, _ in rows[2:])
    return (f"{GB:.2f} GB in {len(jax.tree.leaves(state))} leaves.\n\n"
            + table(["", "Orbax alone, s", "zerojax, s", "ratio", "aim"], lines)
            + f"\nThe digest of all leaves: {marks:.3f} s, {marks / same[1]:.1%} of a restore (aim 3 %); numpy's sum of the same "
              f"words, on one core: {plain_sum:.3f} s. Files are in the page cache. Restoring onto another mesh or stage takes "
              f"at most {others:.2f} times what the same does (aim 2).\n")


def restored_plain(directory):
    plain = Plain(directory)
    return plain.restore(plain.manager.latest_step(), target(zero()))


OPERATIONS = {
    "nothing": lambda directory: None,
    "save": lambda directory: [(c := zj.Checkpointer(directory + "/other")).save(filled(zero())), c.close()],
    "save, Orbax alone": lambda directory: [(c := Plain(directory + "/plain2")).save(filled(zero())), c.wait()],
    "the state to be saved": lambda directory: filled(zero()),
    "restore": lambda directory: zj.Checkpointer(directory).restore_latest(target(zero())),
    "restore, Orbax alone": lambda directory: restored_plain(directory.replace("ours", "plain")),
    "restore at stage 0": lambda directory: zj.Checkpointer(directory).restore_latest(target(zero(8, 0))),
    "verify": lambda directory: zj.Checkpointer(directory).verify(zj.Checkpointer(directory).steps()[-1]),
    "export": lambda directory: zj.export_safetensors(directory, pathlib.Path(directory).parent / "m.safetensors"),
    "import": lambda directory: zj.load_safetensors(pathlib.Path(directory).parent / "m.safetensors", target(zero()).params),
}


def peak_kib() -> int:
    """The most resident memory that this process had; getrusage would count what its parent had when it forked."""
    line, = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def memory(directory) -> str:
    """Peaks of resident memory in processes of their own, less that of a process that does nothing."""
    took = {}
    for name in OPERATIONS:
        done = subprocess.run([sys.executable, __file__, name, f"{directory}/ours"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        took[name] = int(done.stdout.split()[-1])
    base = took.pop("nothing")
    return table(["operation", "MiB"], [(name, f"{mib - base:,}") for name, mib in took.items()])


def markdown() -> str:
    """In a process of its own: it needs eight devices."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def tables() -> str:
    with tempfile.TemporaryDirectory() as directory:
        text = times(directory)
        largest = 4 * SHAPE[0] * SHAPE[1] / 2**20
        state = GB * 1e9 / 2**20
        return (f"{text}\nThe host's memory at its peak, beyond what a process takes that imports jax and zerojax. On CPU devices "
                f"the state is in it, {state:,.0f} MiB, a third of it parameters; the largest leaf has {largest:.0f} MiB.\n\n"
                + memory(directory))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    if len(sys.argv) == 1:
        print(tables())
    else:
        OPERATIONS[sys.argv[1]](sys.argv[2])
        print(peak_kib() // 1024)
