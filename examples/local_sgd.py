"""Local SGD: ten nodes train alone on their part of the data and average after every 100 steps.

    python examples/local_sgd.py                      # half a minute on two cores
    python examples/local_sgd.py --every 20 --diloco  # an outer Nesterov optimizer in each round
    python examples/local_sgd.py --stage 3 --devices 20    # two devices in each node
    zerojax plan examples/local_sgd.py --topology h100:1x8 --compute float32

The model and the images are those of textbook_mlp.py. Synchronous training reduces the gradients of
all nodes in every step; it gets the same batches here, for comparison. The lines that use zerojax
are marked with <--.
"""

import argparse
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import zerojax as zj
from zerojax.plan import theory

NODES, PART, ROWS, HELD_OUT = 10, 160, 8, 160  # nodes, images of each, in its batch, held out


def read_data():
    """Returns training data and held-out data: float32[n, 784] pixels in 0..1, int32[n] labels."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16.0, (len(digits.images), 28, 28), "linear")
    images = np.asarray(images, np.float32).reshape(-1, 784)
    order = np.random.default_rng(0).permutation(len(images))
    data = {"image": images[order], "label": digits.target.astype(np.int32)[order]}
    train = NODES * PART
    return ({name: x[:train] for name, x in data.items()},
            {name: x[train:train + HELD_OUT] for name, x in data.items()})


def batches(data, steps):
    """Returns `steps` batches: 8 images of each node's own 160, node after node."""
    def make(number):
        epoch, place = divmod(number, PART // ROWS)
        order = np.random.default_rng(epoch).permutation(PART)[place * ROWS:(place + 1) * ROWS]
        rows = (PART * np.arange(NODES)[:, None] + order).reshape(-1)
        return {name: x[rows] for name, x in data.items()}

    return zj.Indexed(make, steps)


class MLP(nn.Module):
    """float32[batch, 784] pixels to logits[batch, 10]."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


model = MLP()


def init():
    return model.init(jax.random.key(0), jnp.zeros((1, 784)))


def loss_fn(variables, batch):
    logits = model.apply(variables, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return zj.Loss(losses.sum(), losses.size)


tx = optax.sgd(0.1)


def batch_shape(parts):
    """Returns a batch of 8 images for each device and microbatch."""
    return {"image": jax.ShapeDtypeStruct((8 * parts, 784), jnp.float32),
            "label": jax.ShapeDtypeStruct((8 * parts,), jnp.int32)}


# for `zerojax plan`, `zerojax advise` and `zerojax show`: the synchronous step
recipe = zj.Recipe(init, loss_fn, tx, batch_shape)


def predict(variables, batch):
    return model.apply(variables, batch["image"])


def metric(logits, data):
    """Returns the accuracy."""
    return (np.argmax(logits, -1) == data["label"]).mean()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, default=3, help="ZeRO stage within a node, 0 to 3")
    add("--devices", type=int, default=10, help="number of devices; simulated on a CPU")
    add("--steps", type=int, default=500)
    add("--every", type=int, default=100, help="steps from one average to the next")
    add("--diloco", action="store_true", help="an outer optimizer takes the mean move")
    return parser.parse_args()


def main():
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = zj.make_mesh(islands=math.gcd(NODES, args.devices), devices=jax.devices()[:args.devices])
    zero = zj.Zero(mesh, args.stage)  # <-- the policy within a node
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True) if args.diloco else None
    islands = zero.islands(NODES, every=args.every, outer=outer)  # <-- the nodes
    together = zj.Zero(mesh, args.stage, replica_axis="island")  # <-- synchronous training
    train, held_out = read_data()
    evaluate = zero.jit(zero.gathered(predict), donate=False)

    def accuracy(state):
        return metric(evaluate(state, held_out), held_out)

    local = islands.init(init, tx)  # <-- all nodes start from the same parameters
    local_step = islands.train_step(loss_fn, tx)  # <-- averages after every --every steps
    state, step = together.init(init, tx), together.train_step(loss_fn, tx)
    before = accuracy(state)
    feeds = [zj.feed(batches(train, args.steps), policy) for policy in (islands, together)]
    for i, (parts, batch) in enumerate(zip(*feeds, strict=True), 1):
        local, local_metrics = local_step(local, parts)  # <-- no node waits for another
        state, metrics = step(state, batch)
        if i % args.every == 0 or i == args.steps:
            mean = accuracy(islands.average(local))  # <-- one state, of the mean parameters
            print(f"step {i}: accuracy {mean:.1%} local, {accuracy(state):.1%} synchronous")
    size = sum(x.size for x in jax.tree.leaves(state.params))
    once = theory.wire(0).bytes(size, NODES, reduce=4)  # an all-reduce of float32, from each node
    report("local SGD", args.steps // args.every, once)
    print(f"  accuracy {before:.1%} before, {accuracy(islands.average(local)):.1%} after "
          f"{args.steps} steps; last loss {float(local_metrics['loss'].mean()):.5f}")
    report("synchronous", args.steps, once)
    print(f"  accuracy {before:.1%} before, {accuracy(state):.1%} after {args.steps} steps; "
          f"last loss {float(metrics['loss']):.5f}")


def report(name, times, once):
    print(f"{name}: {times} all-reduces, {times * once / 2**20:.1f} MiB sent by each node")


if __name__ == "__main__":
    main()
