"""What a checkpoint says of itself: JSON beside the arrays, with a digest of every leaf and one of its own."""

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from zerojax import trees
from zerojax.errors import CheckpointError
from zerojax.layout import padded
from zerojax.processes.fingerprint import versions
from zerojax.tables import Sheet, size
from zerojax.train import optimizer

FORMAT = 2
BYTES = "__bytes__"
MOST = 10  # paths in an error


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf as it is on disk: its logical shape and dtype, digest, and where it lay when it was saved; of a typed key, its
    data and the name of its generator; of a padded array, the shape that Orbax has it in."""

    shape: tuple[int, ...]
    dtype: str
    digest: str = ""
    spec: str = ""
    key: str = ""
    kept: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        return f"{self.key + ' key ' if self.key else ''}{self.dtype}{list(self.shape)}"

    @property
    def bytes(self) -> int:
        return jax.numpy.dtype(self.dtype).itemsize * math.prod(self.shape)

    def source(self, sharding: Any = None, kept: tuple[int, ...] | None = None) -> Any:
        """What to read: its shape and dtype as they are on disk; without a sharding, into the host's memory. Padded where it is
        so on disk, or is to be `kept` so."""
        short = jax.dtypes.canonicalize_dtype(self.dtype) != jax.numpy.dtype(self.dtype)  # jax would cut its 64 bits in half
        dtype, sharding = (np.dtype(self.dtype), None) if short else (self.dtype, sharding)
        whole = jax.ShapeDtypeStruct(kept or self.shape, dtype, sharding=sharding)
        return padded.Padded(whole, self.shape) if kept or self.kept else whole


@dataclasses.dataclass(frozen=True, repr=False)
class Manifest:
    """Of one step. Prints as a table of its leaves.

    Attributes:
      step: of the state.
      leaves: path, as "params/blocks/kernel", to `Entry`.
      optimizer: the kinds of state that the optax transform keeps.
      mesh: axis names to sizes; stage, precision: those of the `Zero` that the checkpointer was given, or None.
      data_states: as given to `save`: of every process, if they differ, else one.
      metrics: as given to `save`.
      versions: of packages and Python.
    """

    step: int
    leaves: Mapping[str, Entry]
    optimizer: tuple[str, ...] = ()
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stage: int | None = None
    precision: Mapping[str, Any] | None = None
    data_states: tuple[Any, ...] = (None,)
    metrics: Any = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def to_json(self) -> dict:
        """As JSON values, with `digest`, the SHA-256 of the rest.

        Raises:
          CheckpointError: a data state or metric that JSON can't say.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"format": FORMAT}
        fields |= {"leaves": {path: dataclasses.asdict(entry) for path, entry in self.leaves.items()},
                   "data_states": [plain("data_state", x) for x in self.data_states], "metrics": plain("metrics", self.metrics)}
        values = json.loads(json.dumps(fields, default=dict))
        return values | {"digest": _sha(values)}

    @classmethod
    def from_json(cls, values: dict) -> "Manifest":
        """Raises `ValueError` for anything that `to_json` did not write."""
        values = dict(values)
        if values.pop("digest", None) != _sha(values):
            raise ValueError("the manifest's own digest does not match")
        if values["format"] == 1:  # of one process
            values |= {"format": FORMAT, "data_states": [values.pop("data_state")]}
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}: another version of zerojax wrote it")
        leaves = {path: _entry(**entry) for path, entry in values.pop("leaves").items()}
        values |= {"optimizer": tuple(values["optimizer"]), "data_states": tuple(map(restored, values["data_states"])),
                   "metrics": restored(values["metrics"])}
        return cls(leaves=leaves, **values)

    def data_of(self, process: int, processes: int) -> Any:
        """What one of some processes goes on from.

        Raises:
          CheckpointError: the positions of more or fewer were saved, and they differ.
        """
        if len(self.data_states) not in (1, processes):
            raise CheckpointError(f"step {self.step} was saved by {len(self.data_states)} processes, each at a place of its own in "
                                  f"its data; none of them is that of process {process} of {processes}. Use sources whose position "
                                  "is the same on every process, as zj.Indexed of the batch's number, or restore without it: "
                                  'only=".*".')
        return self.data_states[process % len(self.data_states)]

    @property
    def bytes(self) -> int:
        """Of all leaves."""
        return sum(entry.bytes for entry in self.leaves.values())

    def sheets(self) -> tuple[Sheet, Sheet]:
        """What is said of the whole, and of each leaf."""
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items())
        precision = ", ".join(f"{k} {v}" for k, v in (self.precision or {}).items() if v)
        say = lambda value: json.dumps(plain("", value))
        data = ", ".join(map(say, self.data_states))
        about = [("saved from", f"mesh {mesh}" + ("" if self.stage is None else f", stage {self.stage}, {precision}")),
                 ("optimizer", ", ".join(self.optimizer)), ("data", data), ("metrics", say(self.metrics)),
                 ("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items()))]
        rows = [(path, str(list(e.shape)), e.dtype, e.spec, f"{e.bytes:,}", e.digest) for path, e in self.leaves.items()]
        title = f"step {self.step}: {len(self.leaves)} leaves, {size(self.bytes)}"
        return Sheet(title, ("", ""), tuple(about)), Sheet("", ("leaf", "shape", "dtype", "spec", "bytes", "digest"), tuple(rows))

    def __str__(self) -> str:
        return "\n\n".join(str(sheet) for sheet in self.sheets())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(sheet._repr_html_() for sheet in self.sheets())


def _entry(shape, dtype, kept=None, **rest) -> Entry:
    if any(type(n) is not int or n < 0 for n in [*shape, *(kept or ())]):
        raise ValueError(f"it has a leaf of shape {shape}{f', kept as {kept}' if kept else ''}")
    return Entry(tuple(shape), str(jax.numpy.dtype(dtype)), kept=tuple(kept) if kept else None, **rest)


def _sha(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def plain(where: str, value: Any) -> Any:
    """As JSON values: of bytes, their base64 under a key that no other dict may have."""
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str) or key == BYTES]
        if odd:
            raise CheckpointError(f"save was given a {where} with the key {odd[0]!r}; keys are text, and not {BYTES!r}.")
        return {key: plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(f"{where}[{i}]", item) for i, item in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise CheckpointError(f"save was given a {where} that JSON can't hold, a {type(value).__name__}: {value!r:.60}; give numbers, "
                          "text, bytes, lists and dicts of these.")


def restored(value: Any) -> Any:
    """Of JSON values, what `plain` was given."""
    if isinstance(value, dict):
        if value.keys() == {BYTES}:
            return base64.b64decode(value[BYTES], validate=True)
        return {k: restored(v) for k, v in value.items()}
    return [restored(v) for v in value] if isinstance(value, list) else value


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a state by path.

    Raises:
      CheckpointError: two leaves of one path.
    """
    leaves = [(trees.path_of(path), x) for path, x in jax.tree.leaves_with_path(tree, is_leaf=padded.is_padded)]
    paths = [path for path, _ in leaves]
    twice = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if twice:
        raise CheckpointError(f"the state has two leaves at each of {twice[:MOST]}; rename a key that holds a '/'.")
    return dict(leaves)


def entry_of(x: Any, digest: str = "") -> Entry:
    """Of an array, a shape, or a Python number."""
    spec = getattr(getattr(x, "sharding", None), "spec", None)
    key = key_of(x)
    x = jax.eval_shape(jax.random.key_data, x) if key else x if hasattr(x, "dtype") else number(x)
    return Entry(tuple(x.shape), str(x.dtype), digest, "" if spec is None else f"P({', '.join(map(repr, spec))})", key,
                 tuple(x.kept.shape) if padded.is_padded(x) else None)


def number(x: Any) -> np.ndarray:
    """Of a Python number; whole ones in 32 bits if they fit, as jax keeps them."""
    small = type(x) is int and abs(x) < 2**31
    return np.asarray(x, np.int32 if small else None)


def key_of(x: Any) -> str:
    """The name of a typed key's generator, also of one that is a shape; "" for anything else."""
    if not (hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)):
        return ""
    found = []
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), x)
    return found[0]


def optimizer_of(state: Any) -> tuple[str, ...]:
    """The kinds of state that an optax transform keeps, as `optimizer.kinds`, in a whole state."""
    return optimizer.kinds(state.get("opt_state") if isinstance(state, Mapping) else getattr(state, "opt_state", None))


def differences(manifest: Manifest, wanted: Mapping[str, Entry], *, all_of_it: bool, cast: bool) -> list[str]:
    """A line for each leaf that the checkpoint and the target do not have alike; where `cast`, floating dtypes may differ."""
    lines = [_line(path, manifest.leaves.get(path), entry, cast) for path, entry in wanted.items()]
    extra = [f"{path}: {entry.text} in the checkpoint, not in the target"
             for path, entry in manifest.leaves.items() if all_of_it and path not in wanted]
    return [line for line in lines if line] + extra


def _line(path: str, theirs: Entry | None, ours: Entry, cast: bool) -> str:
    if theirs is None:
        return f"{path}: not in the checkpoint, {ours.text} in the target"
    fits = (theirs.shape, theirs.key) == (ours.shape, ours.key)
    if fits and (theirs.dtype == ours.dtype or (cast and castable(theirs, ours))):
        return ""
    return f"{path}: {theirs.text} in the checkpoint, {ours.text} in the target"


def castable(a: Entry, b: Entry) -> bool:
    """Floating to floating; anything else would be another number."""
    return all("float" in entry.dtype for entry in (a, b))
