"""Writes outputs.json: small models of Hugging Face, and the outputs that `transformers` computes.

    pip install torch transformers; python tests/checkpoint/hugging_face/make.py

The weights follow from their names and shapes (see `hf_inputs.weight`), so only these are stored.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers as hf
from hf_inputs import TOKENS, image, weight
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4}


def models():
    text = SIZES | {"vocab_size": 40, "max_position_embeddings": 12}
    gpt2 = hf.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=4)
    llama = hf.LlamaConfig(**text, num_key_value_heads=2)
    vit = hf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
    return {"gpt2": hf.GPT2LMHeadModel(gpt2), "llama": hf.LlamaForCausalLM(llama),
            "bert": hf.BertForMaskedLM(hf.BertConfig(**text)),
            "vit": hf.ViTForImageClassification(vit)}


def case(model, folder):
    """Returns the names and shapes of a model's tensors in its file, and its logits."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: list(x.shape) for name, x in load_file(file).items()}
    save_file({name: weight(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
    model = type(model).from_pretrained(folder).eval()
    inputs = image().transpose(0, 3, 1, 2) if "vit.layernorm.weight" in shapes else TOKENS
    logits = model(torch.tensor(inputs)).logits.detach().numpy()[..., :8]
    return {"shapes": shapes, "logits": np.round(logits.astype(float), 5).tolist()}


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = {name: case(model, pathlib.Path(folder, name)) for name, model in models().items()}
    (HERE / "outputs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
