"""Saving and restoring a gigabyte over eight CPU devices, compared with Orbax alone.

Times are measured in one process, in turns; the memory of each operation in a process of its own.

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

LEAVES = 21
SHAPE = (2048, 2048)
LEAF_BYTES = 4 * SHAPE[0] * SHAPE[1]
STATE_BYTES = 3 * LEAVES * LEAF_BYTES  # with Adam's two moments: 1.06 GB
ROUNDS = 9
MIB = 2**20
TX = optax.adam(1e-3)


def init(key):
    keys = jax.random.split(key, LEAVES)
    return {f"layer_{i:02}": jax.random.normal(k, SHAPE) for i, k in enumerate(keys)}


def zero(devices=8, stage=3):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:devices]), stage)


def filled(policy):
    """Returns a state with nonzero moments, because zeros would compress to nothing."""
    state = policy.init(init, TX, jax.random.key(0))
    adam, *rest = state.opt_state
    adam = adam._replace(mu=jax.tree.map(lambda p: p * 1.1, state.params),
                         nu=jax.tree.map(jax.numpy.square, state.params))
    return jax.block_until_ready(state.replace(opt_state=(adam, *rest)))


def target(policy):
    return policy.abstract(init, TX, jax.random.key(0))


class Plain:
    """Orbax with its defaults. It cannot save typed keys, so their data is saved."""

    def __init__(self, directory):
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.manager = ocp.CheckpointManager(directory, options=options)
        self.wait = self.manager.wait_until_finished

    def save(self, state):
        item = state.replace(rng=jax.random.key_data(state.rng))
        self.manager.save(int(state.step), args=ocp.args.PyTreeSave(item), force=True)

    def restore(self, step, target):
        item = target.replace(rng=jax.eval_shape(jax.random.key_data, target.rng))

        def onto(x):
            return ocp.ArrayRestoreArgs(sharding=x.sharding or target.step.sharding,
                                        global_shape=x.shape, dtype=x.dtype)

        args = ocp.args.PyTreeRestore(item, jax.tree.map(onto, item))
        return self.manager.restore(step, args=args)


class Ours:
    def __init__(self, directory):
        self.checkpoints = zj.Checkpointer(directory, keep=1)
        self.wait = self.checkpoints.wait
        self.save = self.checkpoints.save

    def restore(self, step, target):
        return self.checkpoints.restore(step, target).state


def numbered(state):
    """Yields the state with one step number after the other."""
    while True:
        state = state.replace(step=state.step + 1)
        yield jax.block_until_ready(state)


def save_times(both, state):
    """Returns the median seconds of a whole save by each, and of the part that blocks the loop."""
    states = numbered(state)
    blocked = {name: [] for name in both}

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
    def restore(name):
        return lambda: jax.block_until_ready(both[name].restore(steps[name], target(policy)))

    runs = [restore(name) for name in both]
    seconds(runs, 1)
    return seconds(runs, rounds)


def digest_times(state):
    """Returns the median seconds of the digest, and of numpy's sum of the same words."""
    arrays = jax.tree.leaves(state.params) + jax.tree.leaves(state.opt_state[0][1:])
    words = [np.asarray(x).view(np.uint32) for x in arrays]
    return seconds([lambda: digest.of(jax.tree.leaves(state)),
                    lambda: [x.sum(dtype=np.uint32) for x in words]], ROUNDS)


def times(directory) -> str:
    both = {"plain": Plain(f"{directory}/plain"), "ours": Ours(f"{directory}/ours")}
    state = filled(zero())
    whole, blocked = save_times(both, state)
    steps = {"plain": both["plain"].manager.latest_step(),
             "ours": both["ours"].checkpoints.steps()[-1]}
    digested, summed = digest_times(state)
    same = restore_times(both, steps, zero())
    others = {"restore onto 4 devices": restore_times(both, steps, zero(4)),
              "restore onto 1 device": restore_times(both, steps, zero(1)),
              "restore at stage 0, replicated on 8 devices":
                  restore_times(both, steps, zero(8, 0), rounds=3)}
    rows = [_row("save, total", whole, "1.10"),
            _row("save, time that blocks the loop", blocked,
                 f"1.05 + {digested / blocked[0]:.2f} for the digest"),
            _row("restore onto the same mesh", same, "1.10"),
            *(_row(name, both_times) for name, both_times in others.items())]
    slowest = max(ours for _, ours in others.values()) / same[1]
    return (f"{STATE_BYTES / 1e9:.2f} GB in {len(jax.tree.leaves(state))} leaves.\n\n"
            + table(["", "Orbax alone, s", "zerojax, s", "ratio", "aim"], rows)
            + f"\nThe digest of all leaves takes {digested:.3f} s, {digested / same[1]:.1%} of a "
              f"restore (aim 3 %); numpy's sum of the same words on one core takes {summed:.3f} s. "
              "The files are in the page cache. Restoring onto another mesh or stage takes at most "
              f"{slowest:.2f} times as long as onto the same mesh (aim 2).\n")


def _row(name, both_times, aim="") -> list[str]:
    plain, ours = both_times
    return [name, f"{plain:.2f}", f"{ours:.2f}", f"{ours / plain:.2f}", aim]


def save(directory):
    checkpoints = zj.Checkpointer(f"{directory}/ours/other")
    checkpoints.save(filled(zero()))
    checkpoints.close()


def save_plain(directory):
    plain = Plain(f"{directory}/ours/plain2")
    plain.save(filled(zero()))
    plain.wait()


def restore(directory, stage=3):
    zj.Checkpointer(f"{directory}/ours").restore_latest(target(zero(8, stage)))


def restore_plain(directory):
    plain = Plain(f"{directory}/plain")
    plain.restore(plain.manager.latest_step(), target(zero()))


def verify(directory):
    checkpoints = zj.Checkpointer(f"{directory}/ours")
    checkpoints.verify(checkpoints.steps()[-1])


def export(directory):
    zj.export_safetensors(f"{directory}/ours", f"{directory}/m.safetensors")


def import_(directory):
    zj.load_safetensors(f"{directory}/m.safetensors", target(zero()).params)


OPERATIONS = {
    "nothing": lambda directory: None,
    "save": save,
    "save, Orbax alone": save_plain,
    "create the state": lambda directory: filled(zero()),
    "restore": restore,
    "restore, Orbax alone": restore_plain,
    "restore at stage 0": lambda directory: restore(directory, stage=0),
    "verify": verify,
    "export": export,
    "import": import_,
}


def peak_kib() -> int:
    """Returns the peak resident memory of this process.

    `getrusage` would include the memory that its parent had when it forked.
    """
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    peak, = [line for line in lines if line.startswith("VmHWM")]
    return int(peak.split()[1])


def memory(directory) -> str:
    """Returns the peak memory of each operation, less that of a process that does nothing."""
    peaks = {name: int(_run(name, directory).split()[-1]) for name in OPERATIONS}
    base = peaks.pop("nothing")
    return table(["operation", "MiB"], [(name, f"{mib - base:,}") for name, mib in peaks.items()])


def markdown() -> str:
    """Returns both tables, from a process of its own because they need eight devices."""
    return _run()


def _run(*arguments) -> str:
    """Runs this file and returns its standard output."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def tables() -> str:
    with tempfile.TemporaryDirectory() as directory:
        text = times(directory)
        return (f"{text}\nPeak host memory, beyond that of a process that only imports jax and "
                "zerojax. On CPU devices it includes the state: "
                f"{STATE_BYTES / MIB:,.0f} MiB, a third of it parameters. The largest leaf has "
                f"{LEAF_BYTES / MIB:.0f} MiB.\n\n{memory(directory)}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    if len(sys.argv) == 1:
        print(tables())
    else:
        OPERATIONS[sys.argv[1]](sys.argv[2])
        print(peak_kib() // 1024)
