"""Models for the GPU compiler, so large that the leaves that stay whole do not matter."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import zerojax as zj

WIDTH, LAYERS, VOCAB, SEQ = 512, 4, 8192, 256
BF16 = jnp.bfloat16
HEAD = 128
Dense = functools.partial(nn.Dense, use_bias=False, dtype=BF16)
DenseGeneral = functools.partial(nn.DenseGeneral, use_bias=False, dtype=BF16)


class Block(nn.Module):
    """Attention and a gelu MLP, `[batch, time, width]` in bfloat16."""

    @nn.compact
    def __call__(self, x, _=None):
        width = x.shape[-1]
        h = nn.LayerNorm(dtype=BF16)(x)
        q, k, v = (DenseGeneral((width // HEAD, HEAD), name=name)(h) for name in "qkv")
        a = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + DenseGeneral(width, axis=(-2, -1), name="o")(a)
        h = nn.gelu(Dense(4 * width, name="up")(nn.LayerNorm(dtype=BF16)(x)))
        return x + Dense(width, name="down")(h), None


class Transformer(nn.Module):
    """Tokens `[batch, time]` to logits `[batch, time, vocab]`."""

    scanned: bool = True
    remat: bool = True
    tied: bool = False
    policy: Callable | None = None
    width: int = WIDTH
    layers: int = LAYERS
    vocab: int = VOCAB

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocab, self.width, dtype=BF16, name="embed")
        x = embed(tokens)
        block = Block
        if self.remat:
            block = nn.remat(Block, prevent_cse=not self.scanned, policy=self.policy)
        if self.scanned:
            layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                             length=self.layers)
            x, _ = layers(name="blocks")(x, None)
        else:
            for i in range(self.layers):
                x, _ = block(name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=BF16)(x)
        return embed.attend(x) if self.tied else Dense(self.vocab, name="head")(x)


class Recurrent(nn.Module):
    """A GRU over `[batch, time]` tokens, whose weights are constant in its loop."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, dtype=BF16, name="embed")(tokens)
        x = nn.RNN(nn.GRUCell(WIDTH, dtype=BF16))(x)
        return Dense(VOCAB, name="head")(x)


class ResNet(nn.Module):
    """Residual convolutions with BatchNorm over `[batch, 32, 32, 3]` images."""

    width: int = 256
    blocks: int = 3

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, dtype=BF16)
        conv = functools.partial(nn.Conv, self.width, (3, 3), use_bias=False, dtype=BF16)
        x = conv()(x)
        for _ in range(self.blocks):
            h = nn.relu(norm()(conv()(x)))
            x = nn.relu(x + norm()(conv()(h)))
        return nn.Dense(1024, dtype=BF16)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    """A residual MLP."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, dtype=BF16, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, dtype=BF16, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, dtype=BF16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxStack(nnx.Module):
    """An embedding, residual MLPs that are scanned with remat, and a head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, dtype=BF16, rngs=rngs)
        make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
        self.blocks = make(nnx.Rngs(params=jax.random.split(rngs.params(), LAYERS)))
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, dtype=BF16, rngs=rngs)

    def __call__(self, tokens):
        body = nnx.scan(nnx.remat(lambda block, x: block(x)), in_axes=(0, nnx.Carry),
                        out_axes=nnx.Carry)
        return self.head(body(self.blocks, self.embed(tokens)))


def next_token_loss(logits, tokens):
    """The total over tokens; the last position predicts nothing."""
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return zj.Loss(losses.sum(), losses.size)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its loss and batches.

    Attributes:
      batch: returns the shapes of a batch of a number of examples.
      again: a regex of the leaves that are gathered again in the backward pass.
    """

    init: Callable
    loss: Callable
    example: tuple[Any, ...]
    batch: Callable[[int], Any]
    again: str = "block.*"


def _tokens(n):
    return jax.ShapeDtypeStruct((n, SEQ), jnp.int32)


def language(model, again="block.*") -> Case:
    def loss(variables, tokens):
        return next_token_loss(model.apply(variables, tokens), tokens)

    return Case(model.init, loss, (jax.random.key(0), _tokens(1)), _tokens, again)


def images() -> Case:
    model = ResNet()

    def loss(variables, batch):
        logits, updates = model.apply(variables, batch["image"], mutable=["batch_stats"])
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return zj.Loss(losses.sum(), losses.size, model_state=updates)

    def batch(n):
        return {"image": jax.ShapeDtypeStruct((2 * n, 32, 32, 3), BF16),
                "label": jax.ShapeDtypeStruct((2 * n,), jnp.int32)}

    example = (jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), BF16))
    return Case(model.init, loss, example, batch, "nothing")


def module() -> Case:
    def loss(model, tokens):
        return next_token_loss(model(tokens), tokens)

    return Case(lambda: NnxStack(nnx.Rngs(0)), loss, (), _tokens)


CASES = {
    "scanned": lambda: language(Transformer()),
    "unrolled": lambda: language(Transformer(scanned=False)),
    "tied": lambda: language(Transformer(tied=True)),
    "rnn": lambda: language(Recurrent(), "nothing"),
    "resnet": images,
    "nnx": module,
}
