"""The maps of `zj.hugging_face`: loaded models compute the logits that `transformers` computes."""

import json
import pathlib

import hf_inputs
import hf_linen
import hf_nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

import zerojax as zj

STORED = json.loads((pathlib.Path(__file__).parent / "hugging_face/outputs.json").read_text())
MODELS = {"gpt2": "GPT2", "llama": "Llama", "bert": "Bert", "vit": "ViT"}


def zero(stage=3):
    return zj.Zero(zj.make_mesh(devices=jax.devices()[:4]), stage, min_shard=1)


def inputs(name):
    return hf_inputs.image() if name == "vit" else jnp.asarray(hf_inputs.TOKENS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the file of each model, as `transformers` would save it."""
    folder = tmp_path_factory.mktemp("hugging_face")
    for name, case in STORED.items():
        tensors = {x: hf_inputs.weight(x, shape) for x, shape in case["shapes"].items()}
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    return {name: folder / f"{name}.safetensors" for name in STORED}


def linen(name, **options):
    model = getattr(hf_linen, MODELS[name])(**options)
    return (lambda: model.init(jax.random.key(0), inputs(name))), model.apply


def in_nnx(name):
    return (lambda: getattr(hf_nnx, MODELS[name])(nnx.Rngs(0))), (lambda model, x: model(x))


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


def check(name, path, init, apply):
    state = zero().init(init, optax.sgd(0.1))
    state = zj.load_safetensors(path, state, **getattr(zj.hugging_face, name.upper()))
    logits = zero().jit(zero().gathered(apply), batch_argnums=(), donate=False)(state, inputs(name))
    np.testing.assert_allclose(np.asarray(logits)[..., :8], STORED[name]["logits"], atol=5e-5)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))


def scanned(name):
    return linen(name, scan=True)


# a row for each model; NNX's Llama is a scan too
QUICK = [("gpt2", scanned), ("llama", in_nnx), ("bert", linen), ("vit", in_nnx)]
SLOW = [("gpt2", linen), ("gpt2", in_nnx), ("llama", linen), ("bert", in_nnx), ("vit", linen)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, module",
                         QUICK + [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW])
def test_logits_are_those_of_transformers(name, module, files):
    check(name, files[name], *module(name))
