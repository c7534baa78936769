"""Maps from the modules of a Flax model to the tensors of Hugging Face models, to load weights.

Each map holds the `rename` and `transform` of `zerojax.load_safetensors`:

    state = zj.load_safetensors("Llama-3.1-8B", state, **zj.hugging_face.LLAMA, cast=True)

The comment of a map lists the names that your modules need. `layers` stands for layers_0, layers_1,
... in linen, for a list `layers` in NNX, or for one module `layers` that a scan has stacked. A
kernel of an attention layer may have one dimension for all heads, or one for the heads and one for
their features. If your modules have other names, rename them to those of the map first:

    rename = {r"^blocks": "layers"} | zj.hugging_face.LLAMA["rename"]
"""

from typing import Any

_LEAVES = {r"\b(h|layers?)_(\d+)\.": r"\1.\2.", r"\b(h|layers?)\.(?!\d)": r"\1.*.",
           r"\.(kernel|scale|embedding)$": ".weight"}
_LINEAR = {r"\b(query|key|value|[qkv]_proj)\.kernel$": "(...) in -> in ...",
           r"\b(query|key|value|[qkv]_proj)\.bias$": "(...) -> ...",
           r"\b(out|o_proj)\.kernel$": "out (...) -> ... out",
           r"\bkernel$": "out in -> in out"}

# GPT2LMHeadModel: wte, wpe, h.{ln_1, attn.{query, key, value, out}, ln_2, mlp.{c_fc, c_proj}},
# ln_f, and lm_head if the model does not use `wte.attend`. The files of "gpt2", "gpt2-medium", ...
# on the hub lack the prefix "transformer.": add {r"^transformer\.": ""} to the end of `rename`.
GPT2: dict[str, Any] = {
    "rename": {r"^lm_head\.": "wte.", r"^": "transformer.",
               r"\battn\.(query|key|value)\.": "attn.c_attn.",
               r"\battn\.out\.": "attn.c_proj."} | _LEAVES,
    "transform": {r"\bquery\.kernel$": "in (0/3 ...) -> in ...",
                  r"\bquery\.bias$": "(0/3 ...) -> ...",
                  r"\bkey\.kernel$": "in (1/3 ...) -> in ...",
                  r"\bkey\.bias$": "(1/3 ...) -> ...",
                  r"\bvalue\.kernel$": "in (2/3 ...) -> in ...",
                  r"\bvalue\.bias$": "(2/3 ...) -> ...",
                  r"\bout\.kernel$": "(...) out -> ... out",
                  r"^lm_head\.kernel$": "out in -> in out",
                  r"\bkernel$": "in out -> in out"},
}

# LlamaForCausalLM, whose names Mistral and Qwen share: embed_tokens, layers.{input_layernorm,
# self_attn.{q_proj, k_proj, v_proj, o_proj}, post_attention_layernorm, mlp.{gate_proj, up_proj,
# down_proj}}, norm, lm_head. The projections may also be named query, key, value and out.
LLAMA: dict[str, Any] = {
    "rename": {r"\bself_attn\.query\.": "self_attn.q_proj.",
               r"\bself_attn\.key\.": "self_attn.k_proj.",
               r"\bself_attn\.value\.": "self_attn.v_proj.",
               r"\bself_attn\.out\.": "self_attn.o_proj.",
               r"^(?!lm_head\.)": "model."} | _LEAVES,
    "transform": _LINEAR,
}

_ENCODER = {r"^layers?(?=[._])": "encoder.layer", r"\bintermediate\.": "intermediate.dense.",
            r"(?<=\.)output\.(?=kernel|bias)": "output.dense.",
            r"\battention\.out\.": "attention.output.dense."}

# BertModel with the heads of BertForMaskedLM and BertForSequenceClassification: embeddings.{
# word_embeddings, position_embeddings, token_type_embeddings, norm}, layers.{attention.{query, key,
# value, out}, attention_norm, intermediate, output, output_norm}, pooler, predictions.{transform,
# norm, bias}, classifier. In old files, the norms' weight and bias are gamma and beta: add
# {r"LayerNorm.weight$": "LayerNorm.gamma", r"LayerNorm.bias$": "LayerNorm.beta"} to `rename`.
BERT: dict[str, Any] = {
    "rename": _ENCODER | {
        r"\battention\.(query|key|value)\.": r"attention.self.\1.",
        r"\battention_norm\.": "attention.output.LayerNorm.",
        r"\boutput_norm\.": "output.LayerNorm.",
        r"^embeddings\.norm\.": "embeddings.LayerNorm.",
        r"^pooler\.": "pooler.dense.",
        r"^predictions\.transform\.": "predictions.transform.dense.",
        r"^predictions\.norm\.": "predictions.transform.LayerNorm.",
        r"^predictions\.": "cls.predictions.",
        r"^(?!classifier\.|cls\.)": "bert."} | _LEAVES,
    "transform": _LINEAR,
}

# ViTForImageClassification: cls_token [1, 1, width], position_embeddings [1, patches + 1, width],
# patch_embeddings (a convolution), layers.{layernorm_before, attention.{query, key, value, out},
# layernorm_after, intermediate, output}, layernorm, classifier.
VIT: dict[str, Any] = {
    "rename": _ENCODER | {
        r"\battention\.(query|key|value)\.": r"attention.attention.\1.",
        r"^patch_embeddings\.": "patch_embeddings.projection.",
        r"^(cls_token|position_embeddings|patch_embeddings)\b": r"embeddings.\1",
        r"^(?!classifier\.)": "vit."} | _LEAVES,
    "transform": {r"^patch_embeddings\.kernel$": "out in height width -> height width in out"}
                 | _LINEAR,
}
