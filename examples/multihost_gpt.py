"""The GPT of train_gpt.py, trained by several processes that each have some of the devices and read some of the data.

    zerojax launch -n 2 --devices 4 examples/multihost_gpt.py               # two processes of four CPU devices, a minute
    JAX_NUM_CPU_DEVICES=8 python examples/multihost_gpt.py                  # one of eight: the same parameters
    zerojax launch -n 2,1 --devices 4 --restarts 1 examples/multihost_gpt.py --checkpoint runs/gpt    # kill one: the other goes on
    srun python examples/multihost_gpt.py --checkpoint /shared/gpt          # or SkyPilot, torchrun, Kubernetes: docs/multihost.md

What several processes need is marked with <--; the rest is as for one.
"""

import argparse
import contextlib
import math

import jax
import numpy as np
import optax
import train_gpt as gpt
from tqdm import tqdm

import zerojax as zj


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, help="of ZeRO, 0 to 3")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches a step")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step, of all processes together")
    parser.add_argument("--checkpoint", metavar="DIR", help="that every process sees: save there, and go on from what is there")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    return parser.parse_args()


def own_part(zero, text, rows, seed, stop):
    """int32[rows / processes, SEQ + 1]: of batch number i, which is the same for any number of processes, those of this one."""
    share, of = zero.share()
    whole, own = gpt.windows(text, rows, seed), np.split(np.arange(rows), of)[share]
    return zj.Indexed(lambda i: whole.make(i)[own], stop)


def main():
    args = arguments()
    zj.initialize(config=vars(args))  # <-- before anything that asks for devices; alone, it does nothing
    zero = zj.Zero(zj.make_mesh(), args.stage, min_shard=2**10)  # over the devices of all processes
    open_checkpoints = lambda: zj.Checkpointer(args.checkpoint, every=args.every, zero=zero)
    with zj.Preemption() as preemption, open_checkpoints() if args.checkpoint else contextlib.nullcontext() as checkpoints:
        train(args, zero, checkpoints, preemption)


def train(args, zero, checkpoints, preemption):
    tx = gpt.optimizer(args.steps)
    step, evaluate = zero.train_step(gpt.loss_fn, tx, accumulate=args.accumulate, clip_norm=1.0), zero.eval_step(gpt.loss_fn)
    state, position = gpt.resumed(checkpoints, zero, tx, resume=False)  # of any number of processes
    text, held_out = gpt.read_text()
    batches = zj.feed(own_part(zero, text, args.batch, 0, args.steps), zero)  # <-- each process reads its own part
    batches.set_state(position)
    speaks = jax.process_index() == 0  # <-- one of them prints
    progress = tqdm(preemption.until(batches), initial=int(state.step), total=args.steps, unit="step", disable=not speaks)
    for i, tokens in enumerate(progress, int(state.step) + 1):
        state, _ = step(state, tokens)
        if checkpoints:
            checkpoints.save(state, step=i, data_state=batches)  # all of them call it: each writes what it has
    held_out = zj.feed(own_part(zero, held_out, args.batch, 1, 8), zero)
    losses = [evaluate(state, tokens)["loss"] for tokens in preemption.until(held_out)]
    if checkpoints:
        checkpoints.save(state, data_state=batches, force=True)
        checkpoints.wait()
    if preemption.requested:
        preemption.exit()
    norm = float(optax.global_norm(state.params))  # on every process: each has a part
    if speaks:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, step {int(state.step)}: held-out text "
              f"{float(np.mean(losses)) / math.log(2):.4f} bits per byte, norm of the parameters {norm:.5f}")


if __name__ == "__main__":
    main()
