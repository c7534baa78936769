"""The small models in linen, with the names that the maps of `zj.hugging_face` list."""

import flax.linen as nn
import jax.numpy as jnp

WIDTH, HEADS, LAYERS = 16, 4, 2


def attention(name, x, **options):
    return nn.MultiHeadDotProductAttention(HEADS, name=name)(x, **options)


def causal(x):
    return nn.make_causal_mask(x[..., 0])


class GPT2Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + attention("attn", nn.LayerNorm(1e-5, name="ln_1")(x), mask=causal(x))
        h = nn.LayerNorm(1e-5, name="ln_2")(x)
        return x + MLP(name="mlp")(h), None


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="c_proj")(nn.gelu(nn.Dense(4 * WIDTH, name="c_fc")(x)))


class GPT2(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        wte = nn.Embed(40, WIDTH, name="wte")
        x = wte(tokens) + nn.Embed(12, WIDTH, name="wpe")(jnp.arange(tokens.shape[1]))
        if self.scan:
            layers = nn.scan(GPT2Block, variable_axes={"params": 0}, split_rngs={"params": True},
                             length=LAYERS)
            x, _ = layers(name="h")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = GPT2Block(name=f"h_{i}")(x)
        return wte.attend(nn.LayerNorm(1e-5, name="ln_f")(x))


def rotated(x):
    """Returns queries or keys [batch, seq, heads, dim] with rotary position embeddings."""
    seq, dim = x.shape[1], x.shape[-1]
    angles = jnp.outer(jnp.arange(seq), 10000.0 ** -(jnp.arange(0, dim, 2) / dim))
    cos, sin = (jnp.tile(f(angles), 2)[:, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-b, a], -1) * sin


def attended(q, k, v):
    """Returns causal attention of queries to fewer keys and values."""
    q, k = rotated(q), rotated(k)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    return nn.dot_product_attention(q, k, v, mask=causal(q[..., 0]))


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        def split(name, heads):
            y = nn.Dense(heads * WIDTH // HEADS, use_bias=False, name=name)(x)
            return y.reshape(*x.shape[:2], heads, -1)

        y = attended(split("q_proj", HEADS), split("k_proj", 2), split("v_proj", 2))
        return nn.Dense(WIDTH, use_bias=False, name="o_proj")(y.reshape(x.shape))


class GatedMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(24, use_bias=False, name="gate_proj")(x)
        up = nn.Dense(24, use_bias=False, name="up_proj")(x)
        return nn.Dense(WIDTH, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class LlamaBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + SelfAttention(name="self_attn")(nn.RMSNorm(name="input_layernorm")(x))
        return x + GatedMLP(name="mlp")(nn.RMSNorm(name="post_attention_layernorm")(x))


class Llama(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(40, WIDTH, name="embed_tokens")(tokens)
        for i in range(LAYERS):
            x = LlamaBlock(name=f"layers_{i}")(x)
        return nn.Dense(40, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


class Embeddings(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(40, WIDTH, name="word_embeddings")(tokens)
        x += nn.Embed(12, WIDTH, name="position_embeddings")(jnp.arange(tokens.shape[1]))
        x += nn.Embed(2, WIDTH, name="token_type_embeddings")(jnp.zeros_like(tokens))
        return nn.LayerNorm(1e-12, name="norm")(x)


class BertBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + attention("attention", x))
        h = nn.gelu(nn.Dense(24, name="intermediate")(x), approximate=False)
        return nn.LayerNorm(1e-12, name="output_norm")(x + nn.Dense(WIDTH, name="output")(h))


class Predictions(nn.Module):
    @nn.compact
    def __call__(self, x, words):
        x = nn.gelu(nn.Dense(WIDTH, name="transform")(x), approximate=False)
        bias = self.param("bias", nn.initializers.zeros, (40,))
        return nn.LayerNorm(1e-12, name="norm")(x) @ words.T + bias


class Bert(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embeddings = Embeddings(name="embeddings")
        x = embeddings(tokens)
        for i in range(LAYERS):
            x = BertBlock(name=f"layers_{i}")(x)
        words = embeddings.variables["params"]["word_embeddings"]["embedding"]
        return Predictions(name="predictions")(x, words)


class ViTBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + attention("attention", nn.LayerNorm(1e-12, name="layernorm_before")(x))
        h = nn.Dense(24, name="intermediate")(nn.LayerNorm(1e-12, name="layernorm_after")(x))
        return x + nn.Dense(WIDTH, name="output")(nn.gelu(h, approximate=False))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), (4, 4), name="patch_embeddings")(images)
        x = x.reshape(len(x), -1, WIDTH)
        first = self.param("cls_token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], 1)
        x += self.param("position_embeddings", nn.initializers.zeros, (1, x.shape[1], WIDTH))
        for i in range(LAYERS):
            x = ViTBlock(name=f"layers_{i}")(x)
        return nn.Dense(5, name="classifier")(nn.LayerNorm(1e-12, name="layernorm")(x[:, 0]))
