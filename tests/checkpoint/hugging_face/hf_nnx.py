"""The small models in NNX, with the names that the maps of `zj.hugging_face` list."""

import jax
import jax.numpy as jnp
from flax import nnx
from hf_linen import HEADS, LAYERS, WIDTH, attended, causal


def attention(rngs):
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)


def layer_norm(rngs, epsilon=1e-12):
    return nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=rngs)


class GPT2Block(nnx.Module):
    def __init__(self, rngs):
        self.ln_1, self.ln_2 = layer_norm(rngs, 1e-5), layer_norm(rngs, 1e-5)
        self.attn = attention(rngs)
        self.mlp = MLP(rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x), mask=causal(x))
        return x + self.mlp(self.ln_2(x))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.c_fc = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.c_proj(jax.nn.gelu(self.c_fc(x)))


class GPT2(nnx.Module):
    def __init__(self, rngs):
        self.wte, self.wpe = nnx.Embed(40, WIDTH, rngs=rngs), nnx.Embed(12, WIDTH, rngs=rngs)
        self.h = nnx.List([GPT2Block(rngs) for _ in range(LAYERS)])
        self.ln_f = layer_norm(rngs, 1e-5)
        self.lm_head = nnx.Linear(WIDTH, 40, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class SelfAttention(nnx.Module):
    def __init__(self, rngs):
        def projection(heads):
            return nnx.LinearGeneral(WIDTH, (heads, WIDTH // HEADS), use_bias=False, rngs=rngs)

        self.query, self.key, self.value = projection(HEADS), projection(2), projection(2)
        self.out = nnx.LinearGeneral((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), use_bias=False,
                                     rngs=rngs)

    def __call__(self, x):
        return self.out(attended(self.query(x), self.key(x), self.value(x)))


class GatedMLP(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(24, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nnx.Module):
    def __init__(self, rngs):
        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.self_attn = SelfAttention(rngs)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = GatedMLP(rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(40, WIDTH, rngs=rngs)
        stack = nnx.split_rngs(splits=LAYERS)(nnx.vmap(LlamaBlock, in_axes=0, out_axes=0))
        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, 40, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        through = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.lm_head(self.norm(through(self.layers, self.embed_tokens(tokens))))


class Embeddings(nnx.Module):
    def __init__(self, rngs):
        self.word_embeddings = nnx.Embed(40, WIDTH, rngs=rngs)
        self.position_embeddings = nnx.Embed(12, WIDTH, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(2, WIDTH, rngs=rngs)
        self.norm = layer_norm(rngs)

    def __call__(self, tokens):
        positions = self.position_embeddings(jnp.arange(tokens.shape[1]))
        types = self.token_type_embeddings(jnp.zeros_like(tokens))
        return self.norm(self.word_embeddings(tokens) + positions + types)


class BertBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = attention(rngs)
        self.attention_norm, self.output_norm = layer_norm(rngs), layer_norm(rngs)
        self.intermediate = nnx.Linear(WIDTH, 24, rngs=rngs)
        self.output = nnx.Linear(24, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.attention_norm(x + self.attention(x))
        h = jax.nn.gelu(self.intermediate(x), approximate=False)
        return self.output_norm(x + self.output(h))


class Predictions(nnx.Module):
    def __init__(self, rngs):
        self.transform = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = layer_norm(rngs)
        self.bias = nnx.Param(jnp.zeros(40))

    def __call__(self, x, words):
        x = jax.nn.gelu(self.transform(x), approximate=False)
        return words.attend(self.norm(x)) + self.bias[...]


class Bert(nnx.Module):
    def __init__(self, rngs):
        self.embeddings = Embeddings(rngs)
        self.layers = nnx.List([BertBlock(rngs) for _ in range(LAYERS)])
        self.predictions = Predictions(rngs)

    def __call__(self, tokens):
        x = self.embeddings(tokens)
        for block in self.layers:
            x = block(x)
        return self.predictions(x, self.embeddings.word_embeddings)


class ViTBlock(nnx.Module):
    def __init__(self, rngs):
        self.layernorm_before, self.layernorm_after = layer_norm(rngs), layer_norm(rngs)
        self.attention = attention(rngs)
        self.intermediate = nnx.Linear(WIDTH, 24, rngs=rngs)
        self.output = nnx.Linear(24, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.layernorm_before(x))
        h = self.intermediate(self.layernorm_after(x))
        return x + self.output(jax.nn.gelu(h, approximate=False))


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patch_embeddings = nnx.Conv(3, WIDTH, (4, 4), (4, 4), rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.position_embeddings = nnx.Param(jnp.zeros((1, 5, WIDTH)))
        self.layers = nnx.List([ViTBlock(rngs) for _ in range(LAYERS)])
        self.layernorm = layer_norm(rngs)
        self.classifier = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, images):
        x = self.patch_embeddings(images).reshape(len(images), -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.cls_token[...], (len(x), 1, 1)), x], 1)
        x = x + self.position_embeddings[...]
        for block in self.layers:
            x = block(x)
        return self.classifier(self.layernorm(x[:, 0]))
