"""Safetensors files that fit a target, that are transformed to fit it, and that do not fit."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from flax import nnx
from flax.training import train_state
from safetensors.numpy import save_file

import zerojax as zj


def check_equal(tree, want):
    assert states.bits(tree) == states.bits(want)


# name: (the tensors of a file, a target that they do not fit, words of the error)
IMPORTS = {
    "a shape": ({"w": np.ones((3, 4), np.float32)}, {"w": jnp.ones((4, 3))},
                r"w: float32\[3, 4\] in .* float32\[4, 3\]"),
    "a dtype": ({"w": np.ones(3, np.int32)}, {"w": jnp.ones(3)},
                r"w: int32\[3\] in the checkpoint, float32\[3\] in the target"),
    "a name": ({"weight": np.ones(3, np.float32)}, {"w": jnp.ones(3)},
               r"The closest names in the files: \{'w': \['weight'\]\}; see rename"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_targets_that_do_not_fit(tmp_path, name):
    given, target, text = IMPORTS[name]
    save_file(given, tmp_path / "m.safetensors")
    with pytest.raises(zj.CheckpointError, match=text):
        zj.load_safetensors(tmp_path, target)


def save_as_pytorch(folder, **tensors):
    save_file({name: np.asarray(x, np.float32) for name, x in tensors.items()},
              folder / "m.safetensors", {"format": "pt"})


SQUARE = np.arange(16).reshape(4, 4)


def test_transforms_turn_cut_and_stack(tmp_path):
    names = {f"h.{i}.qkv": np.arange(24).reshape(6, 4) + 100 * i for i in range(3)}
    save_as_pytorch(tmp_path, **names, table=SQUARE)
    kernel = {"kernel": jnp.ones((3, 4, 3))}
    target = {"h": {"key": kernel, "query": kernel}, "table": jnp.ones(4)}
    found = zj.load_safetensors(
        tmp_path, target, rename={r"^h\.\w+\.kernel": "h.*.qkv"},
        transform={"query": "(0/2 out) in -> in out", "key": "(1/2 out) in -> in out",
                   "table": lambda x: x.sum(0)})
    stacked = np.stack(list(names.values())).transpose(0, 2, 1)
    np.testing.assert_array_equal(found["h"]["query"]["kernel"], stacked[..., :3])
    np.testing.assert_array_equal(found["h"]["key"]["kernel"], stacked[..., 3:])
    np.testing.assert_array_equal(found["table"], SQUARE.sum(0))


KERNEL = {"kernel": jnp.ones((4, 4))}
# name: (options of a load of a square kernel, words of the error)
TRANSFORMS = {
    "a square kernel as it is": ({}, "stores the kernels of linear layers transposed. Write"),
    "another one transformed": ({"transform": {"other": "a b -> b a"}}, "kernel would be read"),
    "a number": ({"transform": {"kernel": 3}}, r"transform=\{'kernel': 3\}: write a pattern"),
    "an invalid regex": ({"transform": {"(": "a b -> a b"}}, "invalid regular expression '\\('"),
    "a pattern that does not fit": ({"transform": {"kernel": "a b -> a"}},
                                    "^kernel, from kernel: the pattern 'a b -> a' does not turn"),
    "a function of another shape": ({"transform": {"kernel": lambda x: x[:2]}},
                                    r"made float32\[2, 4\] of a tensor float32\[4, 4\], but the"),
    "too many stars": ({"rename": {"^": "*.*.*."}}, "has no indices for each *"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_that_are_wrong(tmp_path, name):
    options, text = TRANSFORMS[name]
    save_as_pytorch(tmp_path, kernel=SQUARE)
    with pytest.raises(zj.CheckpointError, match=text):
        zj.load_safetensors(tmp_path, KERNEL, **options)


@pytest.mark.parametrize("pattern", ["out in -> in out", "in out -> in out"])
def test_a_square_kernel_with_a_pattern(tmp_path, pattern):
    save_as_pytorch(tmp_path, kernel=SQUARE)
    found = zj.load_safetensors(tmp_path, KERNEL, transform={"kernel$": pattern})
    np.testing.assert_array_equal(found["kernel"], SQUARE.T if pattern[0] == "o" else SQUARE)


def test_advice_on_dtypes_and_transposed_kernels(tmp_path):
    save_as_pytorch(tmp_path, w=np.ones((3, 4)))
    with pytest.raises(zj.CheckpointError, match=r"write transform=\{'kernel\$': 'out in -> in ou"):
        zj.load_safetensors(tmp_path, {"w": jnp.ones((4, 3))})
    with pytest.raises(zj.CheckpointError, match="For another floating dtype, write cast=True"):
        zj.load_safetensors(tmp_path, {"w": jnp.ones((3, 4), jnp.bfloat16)})


@pytest.mark.parametrize("n", [6, 9, 33])
def test_devices_that_hold_only_padding(tmp_path, n):
    kernel = np.arange(13.0 * n).reshape(13, n)
    save_as_pytorch(tmp_path, kernel=kernel, **{f"h.{i}.b": np.full(3, i) for i in range(n)})
    policy = states.zero(uneven="pad")
    state = policy.init(lambda: {"kernel": jnp.zeros((n, 13)), "h": jnp.zeros((n, 3))}, states.tx)
    found = zj.load_safetensors(tmp_path, state, rename={"^h$": "h.*.b"},
                                transform={"kernel": "o i -> i o"}).params
    np.testing.assert_array_equal(np.asarray(found["kernel"]), kernel.T)
    np.testing.assert_array_equal(np.asarray(found["h"])[:, 0], np.arange(n))


def test_transforms_see_names_between_renamings(tmp_path):
    save_as_pytorch(tmp_path, **{"model.q_proj.weight": SQUARE})
    rename = {r"\bwq\.": "q_proj."} | zj.hugging_face.LLAMA["rename"]
    found = zj.load_safetensors(tmp_path, {"wq": {"kernel": jnp.ones((4, 2, 2))}}, rename=rename,
                                transform=zj.hugging_face.LLAMA["transform"])
    np.testing.assert_array_equal(found["wq"]["kernel"], SQUARE.T.reshape(4, 2, 2))


def test_functions_are_computed_one_by_one(tmp_path):
    save_as_pytorch(tmp_path, **{f"w{i}": np.full(8, i) for i in range(4)})
    made, most = [], []

    class Result(np.ndarray):
        pass

    def doubled(x):
        result = (2 * x).view(Result)
        made.append(weakref.ref(result))
        most.append(sum(ref() is not None for ref in made))
        return result

    found = zj.load_safetensors(tmp_path, {f"w{i}": jnp.zeros(8) for i in range(4)},
                                transform={"w": doubled})
    assert found["w3"].tolist() == [6.0] * 8 and len(most) == 4 and max(most) <= 2


def test_values_that_a_dtype_cannot_represent(tmp_path):
    save_as_pytorch(tmp_path, w=np.array([1.0, 1e6]))
    with pytest.raises(zj.CheckpointError, match="w has values that float16 cannot represent"):
        zj.load_safetensors(tmp_path, {"w": jnp.zeros(2, jnp.float16)}, cast=True)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def test_an_nnx_model_with_dropout(tmp_path):
    state = states.zero().init(lambda: Dropping(nnx.Rngs(0)), states.tx)
    save_as_pytorch(tmp_path, **{"dense.kernel": SQUARE, "dense.bias": np.ones(4)})
    found = zj.load_safetensors(tmp_path, state, transform={"kernel": "o i -> i o"})
    np.testing.assert_array_equal(found.params["dense"]["kernel"], SQUARE.T)
    check_equal(found.model_state, state.model_state)
    with pytest.raises(zj.CheckpointError, match="kernel/value would be read from"):
        zj.load_safetensors(tmp_path, nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
                            rename={r"^(\w+)\.value": r"dense.\1", r"^(\w+)$": r"dense.\1"})
    only = zj.load_safetensors(tmp_path, state, only="params/.*bias")
    check_equal(only.params["dense"]["kernel"], state.params["dense"]["kernel"])


def test_one_tensor_for_two_leaves(tmp_path):
    save_as_pytorch(tmp_path, w=np.ones((3, 4)))
    target = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((3, 4))}
    with pytest.raises(zj.CheckpointError, match="a, b would all be read from 'w' without"):
        zj.load_safetensors(tmp_path, target, rename={".+": "w"})
    same = {"": "x y -> x y"}
    with pytest.raises(zj.CheckpointError, match=r"by the transform 'x y -> x y'; .*'\(0/2 ...\) "):
        zj.load_safetensors(tmp_path, target, rename={".+": "w"}, transform=same)
    found = zj.load_safetensors(tmp_path, {"a": target["a"], "b": jnp.zeros((4, 3))},
                                rename={".+": "w"}, transform={"b": "x y -> y x"})
    assert found["a"].shape == (3, 4) and found["b"].shape == (4, 3)


def test_a_missing_star_is_named(tmp_path):
    save_as_pytorch(tmp_path, **{f"encoder.layer.{i}.norm": np.ones(4) for i in range(2)})
    with pytest.raises(zj.CheckpointError, match=r"rename it to 'encoder\.layer\.\*\.norm'"):
        zj.load_safetensors(tmp_path, {"layers": {"norm": jnp.ones((2, 4))}},
                            rename={"^layers": "encoder.layer"})


def test_targets_that_cannot_be_loaded(tmp_path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(zj.CheckpointError, match="would stay shapes; give a live state"):
        zj.load_safetensors(tmp_path, states.target())
    with pytest.raises(zj.CheckpointError, match="names no devices"):
        zj.load_safetensors(tmp_path, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_a_flax_state_keeps_its_optimizer_state(tmp_path):
    save_file({"w": np.full(3, 2, np.float32)}, tmp_path / "m.safetensors")
    params = {"w": jnp.ones(3)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=states.tx)
    found = zj.load_safetensors(tmp_path, state)
    assert found.params["w"].tolist() == [2, 2, 2] and found.step == 0
    check_equal(found.opt_state, state.opt_state)


def test_unused_tensors_are_named(tmp_path):
    save_file({"w": np.ones(3, np.float32), "left": np.ones(2)}, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="no leaf for 1 of the 2 tensors in .*, such as left") as w:
        zj.load_safetensors(tmp_path, {"w": jnp.ones(3)})
    assert w[0].filename == __file__
