"""Small models x optimizers. A model says how it is made, split and judged; batches are of any size."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

import zerojax as zj

VOCAB, WIDTH, SEQ, LAYERS = 64, 32, 8, 2  # attention has no biases: softmax ignores the keys', whose gradient is all rounding


@dataclasses.dataclass(frozen=True)
class Model:
    """`init()` makes what the loss sees; `split` it into (params, state), `join` puts it together: for the oracle."""

    init: Callable
    loss: Callable
    batch: Callable[[int, int], Any]
    split: Callable
    join: Callable
    per_device: bool = True
    jits: bool = True


def _tokens(rows, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, SEQ), np.int32)


def _digits(rows, seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(rows, 784)).astype(np.float32), "y": rng.integers(0, 10, rows, np.int32)}


def _images(rows, seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32), "y": rng.integers(0, 10, rows, np.int32)}


def _vectors(rows, seed):
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def masked_tokens(logits, tokens):
    """Uneven weights: a token counts unless it is a multiple of 5."""
    mask = (tokens[:, 1:] % 5 != 0).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
    return zj.Loss((losses * mask).sum(), mask.sum())


def mean_tokens(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]).mean()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(h, mask=nn.make_causal_mask(jnp.zeros(x.shape[:2])))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    scanned: bool = True
    remat: bool = False
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH)
        x = embed(tokens)
        block = nn.remat(Block, prevent_cse=not self.scanned) if self.remat else Block
        if self.scanned:
            x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()(x, None)
        else:
            for _ in range(LAYERS):
                x, _ = block()(x)
        return embed.attend(x) if self.tied else nn.Dense(VOCAB)(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(VOCAB)(nn.RNN(nn.GRUCell(WIDTH))(nn.Embed(VOCAB, WIDTH)(tokens)))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=False, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + norm()(nn.Conv(16, (3, 3), use_bias=False)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, use_bias=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x), mask=nnx.make_causal_mask(jnp.zeros(x.shape[:2])))
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
    """An Equinox-style module: a registered dataclass that is called."""

    weight: jax.Array
    bias: jax.Array
    name: str = dataclasses.field(default="affine", metadata={"static": True})

    def __call__(self, x):
        return x @ self.weight.T + self.bias[None]


def _matrix(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(WIDTH)


def _linen(model, loss, batch, *, state=False, per_device=True, example=1):
    def init():
        return model.init(jax.random.key(0), jax.tree.map(jnp.asarray, _inputs(batch(example, 0))))

    def judged(variables, batch):
        if not state:
            return loss(model.apply(variables, _inputs(batch)), batch)
        logits, new = model.apply(variables, _inputs(batch), mutable=["batch_stats"])
        return loss(logits, batch).replace(model_state=new)

    split = lambda v: (v["params"], {k: x for k, x in v.items() if k != "params"})
    return Model(init, judged, batch, split, lambda p, s: {"params": p, **s}, per_device)


def _inputs(batch):
    return batch["x"] if isinstance(batch, dict) else batch


def _labelled(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["y"])
    weights = 1.0 + (batch["y"] % 3)
    return zj.Loss((losses * weights).sum(), weights.sum(), {"correct": (logits.argmax(-1) == batch["y"]).sum()})


def _nnx():
    graphdef, _, _ = nnx.split(NnxTransformer(nnx.Rngs(0)), nnx.Param, ...)

    def split(model):
        _, params, state = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    loss = lambda model, tokens: masked_tokens(model(tokens), tokens)
    return Model(lambda: NnxTransformer(nnx.Rngs(0)), loss, _tokens, split, lambda p, s: nnx.merge(graphdef, p, s), jits=False)


def _tree(init, apply):
    loss = lambda model, x: zj.Loss((apply(model, x) ** 2).sum(), 2 * x.shape[0])
    return Model(init, loss, _vectors, lambda m: (m, None), lambda p, _: p)


def _scan_matrices(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["out"]


def _equinox():
    def init():
        return eqx.nn.MLP(WIDTH, WIDTH, 64, 2, key=jax.random.key(0))

    static = eqx.partition(init(), eqx.is_inexact_array)[1]
    loss = lambda model, x: (jax.vmap(model)(x) ** 2).mean()
    return Model(init, loss, _vectors, lambda m: (eqx.partition(m, eqx.is_inexact_array)[0], None),
                 lambda p, _: eqx.combine(p, static), jits=False)


MODELS = {
    "mlp": lambda: _linen(MLP(), _labelled, _digits),
    "scanned": lambda: _linen(Transformer(), masked_tokens, _tokens),
    "scanned_remat": lambda: _linen(Transformer(remat=True), masked_tokens, _tokens),
    "unrolled": lambda: _linen(Transformer(scanned=False), mean_tokens, _tokens),
    "unrolled_remat": lambda: _linen(Transformer(scanned=False, remat=True), masked_tokens, _tokens),
    "tied": lambda: _linen(Transformer(tied=True, remat=True), masked_tokens, _tokens),
    "rnn": lambda: _linen(Recurrent(), masked_tokens, _tokens),
    "resnet": lambda: _linen(ResNet(), _labelled, _images, state=True, per_device=False),
    "nnx": _nnx,
    "matrices": lambda: _tree(lambda: {"a": _matrix(1, WIDTH, 64), "b": _matrix(2, 64, WIDTH)},
                              lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]),
    "scanned_matrices": lambda: _tree(lambda: {"layers": _matrix(1, 3, WIDTH, WIDTH), "out": _matrix(2, WIDTH, 40)},
                                      _scan_matrices),
    "dataclass": lambda: _tree(lambda: [Affine(_matrix(1, 64, WIDTH), jnp.zeros(64)), Affine(_matrix(2, 40, 64), jnp.zeros(40))],
                               lambda p, x: p[1](jnp.tanh(p[0](x)))),
    "equinox": _equinox,
}


def _odd(lr):
    """A user's transform with state of shapes of its own: a row mean a parameter, a ring of norms, a counter."""

    def init(params):
        return {"rows": jax.tree.map(lambda p: jnp.zeros(p.shape[:1]), params), "ring": jnp.zeros((3, 5)), "n": jnp.int32(0)}

    def update(grads, state, params=None):
        rows = jax.tree.map(lambda r, g: 0.9 * r + 0.1 * g.reshape(g.shape[0], -1).mean(1), state["rows"], grads)
        ring = state["ring"].at[state["n"] % 3, 0].set(optax.global_norm(grads))
        return jax.tree.map(lambda g: -lr * g, grads), {"rows": rows, "ring": ring, "n": state["n"] + 1}

    return optax.GradientTransformation(init, update)


def _is_matrix(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _kinds(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "vector", params)


# eps is large enough that a gradient near 0 does not become a step of full size, of a sign that rounding decides
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2, eps=1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-3)),
    "masked": lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), _is_matrix), optax.sgd(0.05, momentum=0.9)),
    "multi_transform": lambda: optax.multi_transform({"matrix": optax.adam(1e-2, eps=1e-3), "vector": optax.sgd(0.1)}, _kinds),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 1e-3, 10), eps=1e-3),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2, eps=1e-3), 2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8, eps=1e-3),
    "lion": lambda: optax.lion(1e-4),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, eps=1e-3),
    "muon": lambda: optax.contrib.muon(1e-2, adam_eps_root=1e-6),
    "if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2, eps=1e-3), 3),
    "odd": lambda: _odd(0.05),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=False),
}
