"""The transformer's training step with FSDP by hand: `shard_map` and an all-gather per layer.

It is the reference for temporaries, with the same blocks, loss and shards: whole weights live only
as long as their layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def _gather(x, spec):
    """Gathers an fp32 shard to a whole in bf16; the transpose is a reduce-scatter in bf16."""
    x = x.astype(jnp.bfloat16)
    index = next((i for i, entry in enumerate(spec) if entry), None)
    return x if index is None else jax.lax.all_gather(x, "data", axis=index, tiled=True)


def _is_spec(x):
    return isinstance(x, P)


def _loss(params, specs, tokens):
    embedding = _gather(params["embed"]["embedding"], specs["embed"]["embedding"])
    x = jnp.take(embedding, tokens, axis=0)
    of_layer = jax.tree.map(lambda s: P(*s[1:]), specs["blocks"], is_leaf=_is_spec)

    @jax.checkpoint
    def layer(x, block):
        whole = jax.tree.map(_gather, block, of_layer)
        return models.Block().apply({"params": whole}, x)[0], None

    x, _ = jax.lax.scan(layer, x, params["blocks"])
    x = nn.LayerNorm(dtype=jnp.bfloat16).apply({"params": params["LayerNorm_0"]}, x)
    logits = x @ _gather(params["head"]["kernel"], specs["head"]["kernel"])
    return models.next_token_loss(logits, tokens).total


def lower(mesh, state, batch):
    """Returns the lowered step for a `zero.abstract` state of `models.Transformer()`."""
    tx = optax.adam(1e-3)
    specs = jax.tree.map(_full, state.params)

    def grads(params, tokens):
        return jax.tree.map(_summed, jax.grad(_loss)(params, specs, tokens), specs)

    mapped = jax.shard_map(grads, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs,
                           check_vma=False)

    def step(params, opt_state, tokens):
        updates, opt_state = tx.update(mapped(params, tokens), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    tokens = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=NamedSharding(mesh, P("data")))
    return jax.jit(step, donate_argnums=(0, 1)).lower(state.params, state.opt_state, tokens)


def _full(x):
    """Returns the spec of an array, with an entry for each dimension."""
    spec = x.sharding.spec
    return P(*spec, *[None] * (x.ndim - len(spec)))


def _summed(grad, spec):
    """Sums the gradient of a parameter that every device holds whole."""
    return grad if any(spec) else jax.lax.psum(grad, "data")
