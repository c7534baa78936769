"""The transformer's training step as one writes FSDP by hand: `shard_map`, all-gather in the layer, its transpose behind.

The reference for temporaries: same blocks, same loss, same shards; whole weights live as long as a layer does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def _gather(x, spec):
    """A shard of fp32 to the whole in bf16; the transpose is a reduce-scatter in bf16."""
    x = x.astype(jnp.bfloat16)
    index = next((i for i, entry in enumerate(spec) if entry), None)
    return x if index is None else jax.lax.all_gather(x, "data", axis=index, tiled=True)


def _is_spec(x):
    return isinstance(x, P)


def _loss(params, specs, tokens):
    whole = lambda tree, spec: jax.tree.map(_gather, tree, spec)
    x = jnp.take(_gather(params["embed"]["embedding"], specs["embed"]["embedding"]), tokens, axis=0)
    of_layer = jax.tree.map(lambda s: P(*s[1:]), specs["blocks"], is_leaf=_is_spec)

    @jax.checkpoint
    def layer(x, block):
        return models.Block().apply({"params": whole(block, of_layer)}, x)[0], None

    x, _ = jax.lax.scan(layer, x, params["blocks"])
    x = nn.LayerNorm(dtype=jnp.bfloat16).apply({"params": params["LayerNorm_0"]}, x)
    logits = x @ _gather(params["head"]["kernel"], specs["head"]["kernel"])
    return models.next_token_loss(logits, tokens).total


def lower(mesh, state, batch):
    """The step for a `zero.abstract` state of `models.Transformer()`, lowered."""
    tx = optax.adam(1e-3)
    specs = jax.tree.map(lambda x: P(*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))), state.params)

    def grads(params, tokens):
        grads = jax.grad(_loss)(params, specs, tokens)
        replicated = lambda s: not any(s)
        return jax.tree.map(lambda g, s: jax.lax.psum(g, "data") if replicated(s) else g, grads, specs)

    mapped = jax.shard_map(grads, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs, check_vma=False)

    def step(params, opt_state, tokens):
        updates, opt_state = tx.update(mapped(params, tokens), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    tokens = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=NamedSharding(mesh, P("data")))
    return jax.jit(step, donate_argnums=(0, 1)).lower(state.params, state.opt_state, tokens)
