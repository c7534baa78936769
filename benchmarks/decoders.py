"""The decoders of published training runs: MPT and Llama, whose attention is cuDNN's."""

import dataclasses

import flash
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

import zerojax as zj

BF16 = jnp.bfloat16
HEAD = 128
PRODUCTS = ("qkv", "q", "k", "v", "attention", "o", "gate", "up")
SELECTED = ("q", "v", "attention", "gate")  # torchtitan's selective checkpointing repeats k, o, up


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder, whose heads are `HEAD` wide: of Llama, if it has `hidden`."""

    width: int
    layers: int
    vocab: int = 50368
    kv_heads: int = 0
    hidden: int = 0

    @property
    def llama(self) -> bool:
        return bool(self.hidden)


MODELS = {
    "mpt-760m": Shape(1536, 24), "mpt-1b": Shape(2048, 24), "mpt-3b": Shape(2560, 32),
    "mpt-7b": Shape(4096, 32), "mpt-13b": Shape(5120, 40), "mpt-30b": Shape(7168, 48),
    "mpt-70b": Shape(8192, 80),
    "llama-2-7b": Shape(4096, 32, 32000, 32, 11008),
    "llama-3.1-8b": Shape(4096, 32, 128256, 8, 14336),
}


def of(name: str, remat: str, mesh) -> "Decoder":
    """Returns the decoder with a name of `MODELS`."""
    return Decoder(MODELS[name], remat, mesh)


def loss(model, variables, tokens) -> zj.Loss:
    """Returns the total cross-entropy of the next tokens; the last predicts the first."""
    logits = model.apply(variables, tokens).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, 1))
    return zj.Loss(losses.sum(), losses.size)


def dense(features: int, name: str, x):
    """Returns a product by its name, by which a policy can save it."""
    layer = nn.Dense(features, use_bias=False, dtype=BF16, name=name)
    return checkpoint_name(layer(x), name)


class Block(nn.Module):
    """Attention and an MLP, `[batch, time, width]` in bfloat16."""

    shape: Shape
    mesh: object

    @nn.compact
    def __call__(self, x, _=None):
        x = x + dense(self.shape.width, "o", self._attention(_norm(self.shape)(x)))
        return x + dense(self.shape.width, "down", self._hidden(_norm(self.shape)(x))), None

    def _attention(self, h):
        heads = self.shape.width // HEAD
        if self.shape.llama:
            widths = {"q": heads, "k": self.shape.kv_heads, "v": self.shape.kv_heads}
            q, k, v = (dense(n * HEAD, name, h) for name, n in widths.items())
        else:
            q, k, v = jnp.split(dense(3 * heads * HEAD, "qkv", h), 3, -1)
        q, k, v = (x.reshape(*x.shape[:2], -1, HEAD) for x in (q, k, v))
        if self.shape.llama:
            q, k = _rotated(q), _rotated(k)
        return flash.attention(q, k, v, self.mesh).reshape(*h.shape[:2], heads * HEAD)

    def _hidden(self, h):
        if not self.shape.llama:
            return nn.gelu(dense(4 * self.shape.width, "up", h))
        return nn.silu(dense(self.shape.hidden, "gate", h)) * dense(self.shape.hidden, "up", h)


def _norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(dtype=BF16) if shape.llama else nn.LayerNorm(use_bias=False, dtype=BF16)


def _rotated(x):
    """Returns `[batch, time, heads, width]` with rotary positions."""
    angles = jnp.arange(x.shape[1])[:, None, None] / 10000 ** jnp.linspace(0, 1, HEAD // 2)
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """Tokens `[batch, time]` to logits `[batch, time, vocab]`, with scanned blocks."""

    shape: Shape
    remat: str
    mesh: object

    @nn.compact
    def __call__(self, tokens):
        shape = self.shape
        embed = nn.Embed(shape.vocab, shape.width, dtype=BF16, name="embed")
        x = embed(tokens)
        if not shape.llama:
            places = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1])
            x = x + nn.Embed(tokens.shape[1], shape.width, dtype=BF16, name="positions")(places)
        block = nn.remat(Block, prevent_cse=False, policy=_policy(self.remat))
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                         length=shape.layers)
        x, _ = layers(shape, self.mesh, name="blocks")(x, None)
        x = _norm(shape)(x)
        return dense(shape.vocab, "head", x) if shape.llama else embed.attend(x)


def _policy(remat: str):
    """Returns the policy of a block. Gathered weights are gathered again in any case.

    Args:
      remat: "full" repeats all, "selective" half of the products, "none" no products.
    """
    if remat == "full":
        return None
    names = PRODUCTS if remat == "none" else SELECTED
    return zj.remat.regather(jax.checkpoint_policies.save_only_these_names(*names))
