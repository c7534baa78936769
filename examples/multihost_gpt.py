"""Trains the GPT of train_gpt.py with several processes.

Each process has some of the devices and reads some of the data.

    # two processes with four CPU devices each: one minute
    zerojax launch -n 2 --devices 4 examples/multihost_gpt.py
    # one process with eight CPU devices ends with the same parameters
    JAX_NUM_CPU_DEVICES=8 python examples/multihost_gpt.py
    # if one of two processes is killed, the job continues with the other
    zerojax launch -n 2,1 --devices 4 --restarts 1 examples/multihost_gpt.py --checkpoint runs/gpt
    # on a cluster; docs/multihost.md has SkyPilot, torchrun and Kubernetes
    srun python examples/multihost_gpt.py --checkpoint /shared/gpt

The lines that several processes need are marked with <--. All others are the same as for one.
"""

import argparse
import math

import jax
import numpy as np
import optax
import train_gpt as gpt
from tqdm import tqdm

import zerojax as zj


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage, 0 to 3")
    add("--accumulate", type=int, default=1, help="microbatches per step")
    add("--steps", type=int, default=150)
    add("--batch", type=int, default=32, help="sequences per step, of all processes together")
    add("--checkpoint", metavar="DIR", help="shared directory to save to and to resume from")
    add("--every", type=int, default=50, help="steps between checkpoints")
    return parser.parse_args()


def own_part(zero, text, rows, seed, stop):
    """Returns batches int32[rows / processes, SEQ + 1], this process's share of each batch.

    The whole batch depends only on its number, not on the number of processes.
    """
    share, of = zero.share()
    own = np.split(np.arange(rows), of)[share]
    whole = gpt.windows(text, rows, seed)
    return zj.Indexed(lambda i: whole.make(i)[own], stop)


def main():
    args = arguments()
    zj.initialize(config=vars(args))  # <-- before anything that looks for devices
    # over the devices of all processes
    zero = zj.Zero(zj.make_mesh(), args.stage, min_shard=2**10)
    with zj.Preemption() as preemption, gpt.opened(args, zero) as checkpoints:
        train(args, zero, checkpoints, preemption)


def train(args, zero, checkpoints, preemption):
    tx = gpt.optimizer(args.steps)
    step = zero.train_step(gpt.loss_fn, tx, accumulate=args.accumulate, clip_norm=1.0)
    # the checkpoint may have been saved by another number of processes
    state, position = gpt.resumed(checkpoints, zero, tx, resume=False)
    text, held_out = gpt.read_text()
    batches = zj.feed(own_part(zero, text, args.batch, 0, args.steps), zero)  # <-- its own share
    batches.set_state(position)
    first, prints = int(state.step), jax.process_index() == 0  # <-- only one process prints
    progress = tqdm(preemption.until(batches), initial=first, total=args.steps, unit="step",
                    disable=not prints)
    for i, tokens in enumerate(progress, first + 1):
        state, _ = step(state, tokens)
        if checkpoints:  # all processes call save, and each writes the data that it holds
            checkpoints.save(state, step=i, data_state=batches)
    loss = held_out_loss(zero, state, own_part(zero, held_out, args.batch, 1, 8), preemption)
    if checkpoints:
        checkpoints.save(state, data_state=batches, force=True)
        checkpoints.wait()
    if preemption.requested:
        preemption.exit()
    norm = float(optax.global_norm(state.params))  # on all processes, because each has some shards
    if prints:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, "
              f"step {int(state.step)}: held-out text {loss / math.log(2):.4f} bits per byte, "
              f"norm of the parameters {norm:.5f}")


def held_out_loss(zero, state, batches, preemption):
    evaluate = zero.eval_step(gpt.loss_fn)
    fed = preemption.until(zj.feed(batches, zero))
    losses = [evaluate(state, tokens)["loss"] for tokens in fed]
    return float(np.mean(losses)) if losses else math.nan  # none if the run is stopped here


if __name__ == "__main__":
    main()
