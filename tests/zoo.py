"""Small models and optimizers for the tests; batches have any size."""

import dataclasses
import functools
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

# Attention has no biases: softmax ignores those of keys, so that their gradient is only rounding.
VOCAB, WIDTH, SEQ, LAYERS = 64, 32, 8, 2


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its loss and batches.

    Attributes:
      init: returns the model that the loss receives.
      loss: a function of (model, batch).
      batch: returns the batch of (rows, seed).
      split: a function from the model to (params, state), for the oracle.
      join: the inverse of `split`.
      per_device: whether its loss is a sum over examples.
      jits: whether `init` can run under jit.
    """

    init: Callable
    loss: Callable
    batch: Callable[[int, int], Any]
    split: Callable
    join: Callable
    per_device: bool = True
    jits: bool = True

    @functools.cached_property
    def born(self):
        """(params, state) of a new model."""
        return self.split(jax.jit(self.init)() if self.jits else self.init())


def _tokens(rows, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, SEQ), np.int32)


def _digits(rows, seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(rows, 784)).astype(np.float32),
            "y": rng.integers(0, 10, rows, np.int32)}


def _images(rows, seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
            "y": rng.integers(0, 10, rows, np.int32)}


def _vectors(rows, seed):
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def masked_tokens(logits, tokens):
    """A loss with uneven weights: a token counts unless it is a multiple of 5."""
    mask = (tokens[:, 1:] % 5 != 0).astype(jnp.float32)
    losses = _cross_entropy(logits[:, :-1], tokens[:, 1:])
    return zj.Loss((losses * mask).sum(), mask.sum())


def mean_tokens(logits, tokens):
    return _cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(h, mask=mask)
        h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


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
            blocks = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                             length=LAYERS)
            x, _ = blocks()(x, None)
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
        x = nn.relu(_convolved(x))
        x = nn.relu(x + _convolved(x))
        return nn.Dense(10)(x.mean((1, 2)))


def _convolved(x):
    norm = nn.BatchNorm(use_running_average=False, momentum=0.9)
    return norm(nn.Conv(16, (3, 3), use_bias=False)(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x), mask=nnx.make_causal_mask(jnp.zeros(x.shape[:2])))
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
    """An Equinox-style module: a callable registered dataclass."""

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

    def loss_fn(variables, batch):
        if not state:
            return loss(model.apply(variables, _inputs(batch)), batch)
        logits, new = model.apply(variables, _inputs(batch), mutable=["batch_stats"])
        return loss(logits, batch).replace(model_state=new)

    def split(variables):
        return variables["params"], {k: x for k, x in variables.items() if k != "params"}

    return Model(init, loss_fn, batch, split, lambda p, s: {"params": p, **s}, per_device)


def _inputs(batch):
    return batch["x"] if isinstance(batch, dict) else batch


def _labelled(logits, batch):
    losses = _cross_entropy(logits, batch["y"])
    weights = 1.0 + (batch["y"] % 3)
    correct = (logits.argmax(-1) == batch["y"]).sum()
    return zj.Loss((losses * weights).sum(), weights.sum(), {"correct": correct})


def _nnx():
    graphdef, _, _ = nnx.split(NnxTransformer(nnx.Rngs(0)), nnx.Param, ...)

    def split(model):
        _, params, state = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def loss(model, tokens):
        return masked_tokens(model(tokens), tokens)

    return Model(lambda: NnxTransformer(nnx.Rngs(0)), loss, _tokens, split,
                 lambda p, s: nnx.merge(graphdef, p, s), jits=False)


def _tree(init, apply):
    def loss(model, x):
        return zj.Loss((apply(model, x) ** 2).sum(), 2 * x.shape[0])

    return Model(init, loss, _vectors, lambda m: (m, None), lambda p, _: p)


def _matrices():
    return _tree(lambda: {"a": _matrix(1, WIDTH, 64), "b": _matrix(2, 64, WIDTH)},
                 lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])


def _scanned_matrices():
    return _tree(lambda: {"layers": _matrix(1, 3, WIDTH, WIDTH), "out": _matrix(2, WIDTH, 40)},
                 _scan_matrices)


def _scan_matrices(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["out"]


def _dataclass():
    def init():
        return [Affine(_matrix(1, 64, WIDTH), jnp.zeros(64)),
                Affine(_matrix(2, 40, 64), jnp.zeros(40))]

    return _tree(init, lambda p, x: p[1](jnp.tanh(p[0](x))))


def _equinox():
    def init():
        return eqx.nn.MLP(WIDTH, WIDTH, 64, 2, key=jax.random.key(0))

    def loss(model, x):
        return (jax.vmap(model)(x) ** 2).mean()

    def split(model):
        return eqx.partition(model, eqx.is_inexact_array)[0], None

    static = eqx.partition(init(), eqx.is_inexact_array)[1]
    return Model(init, loss, _vectors, split, lambda p, _: eqx.combine(p, static), jits=False)


def _transformer(loss=masked_tokens, **options):
    return lambda: _linen(Transformer(**options), loss, _tokens)


MODELS = {
    "mlp": lambda: _linen(MLP(), _labelled, _digits),
    "scanned": _transformer(),
    "scanned_remat": _transformer(remat=True),
    "unrolled": _transformer(mean_tokens, scanned=False),
    "unrolled_remat": _transformer(scanned=False, remat=True),
    "tied": _transformer(tied=True, remat=True),
    "rnn": lambda: _linen(Recurrent(), masked_tokens, _tokens),
    "resnet": lambda: _linen(ResNet(), _labelled, _images, state=True, per_device=False),
    "nnx": _nnx,
    "matrices": _matrices,
    "scanned_matrices": _scanned_matrices,
    "dataclass": _dataclass,
    "equinox": _equinox,
}
MODELS = {name: functools.cache(make) for name, make in MODELS.items()}


def _odd(lr):
    """A transform whose state has its own shapes: row means, a ring of norms, a counter."""

    def init(params):
        return {"rows": jax.tree.map(lambda p: jnp.zeros(p.shape[:1]), params),
                "ring": jnp.zeros((3, 5)), "n": jnp.int32(0)}

    def row_mean(old, g):
        return 0.9 * old + 0.1 * g.reshape(g.shape[0], -1).mean(1)

    def update(grads, state, params=None):
        rows = jax.tree.map(row_mean, state["rows"], grads)
        ring = state["ring"].at[state["n"] % 3, 0].set(optax.global_norm(grads))
        updates = jax.tree.map(lambda g: -lr * g, grads)
        return updates, {"rows": rows, "ring": ring, "n": state["n"] + 1}

    return optax.GradientTransformation(init, update)


def _is_matrix(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _kinds(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "vector", params)


def _masked():
    decay = optax.masked(optax.add_decayed_weights(0.1), _is_matrix)
    return optax.chain(decay, optax.sgd(0.05, momentum=0.9))


def _multi_transform():
    transforms = {"matrix": optax.adam(1e-2, eps=1e-3), "vector": optax.sgd(0.1)}
    return optax.multi_transform(transforms, _kinds)


def _inject():
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    return optax.inject_hyperparams(optax.adam)(schedule, eps=1e-3)


def _sam():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(0.05), adversary, opaque_mode=False)


# eps is large enough that a gradient near 0 does not become a full-size step with a random sign.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2, eps=1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-3)),
    "masked": _masked,
    "multi_transform": _multi_transform,
    "inject": _inject,
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2, eps=1e-3), 2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8, eps=1e-3),
    "lion": lambda: optax.lion(1e-4),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, eps=1e-3),
    "muon": lambda: optax.contrib.muon(1e-2, adam_eps_root=1e-6),
    "if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2, eps=1e-3), 3),
    "odd": lambda: _odd(0.05),
    "sam": _sam,
}
