"""The manifest of a step: JSON beside the arrays, with a digest of every leaf and one of itself."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from zerojax.checkpoint import json_values
from zerojax.checkpoint.entries import Entry
from zerojax.errors import CheckpointError
from zerojax.processes.fingerprint import versions
from zerojax.tables import Printed, Sheet, quantity, size
from zerojax.train import optimizer

FORMAT = 2


@dataclasses.dataclass(frozen=True, repr=False)
class Manifest(Printed):
    """The manifest of a step. Prints as a table of its leaves.

    Attributes:
      step: the step of the state.
      leaves: from a path, such as "params/blocks/kernel", to its `Entry`.
      optimizer: the kinds of state that the optax transform keeps.
      mesh: from the name of an axis to its size.
      stage: the stage of the `Zero` that the checkpointer was given, or None.
      precision: the precision of that `Zero`, or None.
      data_states: the data state that each process gave to `save`; one if they are equal.
      metrics: the metrics given to `save`.
      versions: from the name of a package, or "python", to its version.
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
        """Returns JSON values, with the key `digest` for the SHA-256 of the rest.

        Raises:
          CheckpointError: JSON cannot represent a data state or a metric.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["format"] = FORMAT
        fields["leaves"] = {p: dataclasses.asdict(entry) for p, entry in self.leaves.items()}
        fields["data_states"] = [json_values.encoded("data_state", x) for x in self.data_states]
        fields["metrics"] = json_values.encoded("metrics", self.metrics)
        values = json.loads(json.dumps(fields, default=dict))
        return values | {"digest": sha256(values)}

    @classmethod
    def from_json(cls, values: dict) -> "Manifest":
        """Returns the manifest for which `to_json` returned these values.

        Raises:
          ValueError, TypeError, KeyError, AttributeError: `to_json` did not return these values.
        """
        values = dict(values)
        if values.pop("digest", None) != sha256(values):
            raise ValueError("the manifest's own digest does not match")
        if values["format"] == 1:  # written by one process
            values["format"] = FORMAT
            values["data_states"] = [values.pop("data_state")]
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}: another version of zerojax wrote it")
        values["leaves"] = {p: _entry(**entry) for p, entry in values["leaves"].items()}
        values["optimizer"] = tuple(values["optimizer"])
        values["data_states"] = tuple(map(json_values.decoded, values["data_states"]))
        values["metrics"] = json_values.decoded(values["metrics"])
        return cls(**values)

    def data_of(self, process: int, processes: int) -> Any:
        """Returns the data state from which one of `processes` processes continues.

        Raises:
          CheckpointError: another number of processes saved data states that differ.
        """
        if len(self.data_states) not in (1, processes):
            raise CheckpointError(f"step {self.step} was saved by {len(self.data_states)} "
                                  "processes, each at its own position in the data, so it has no "
                                  f"position for process {process} of {processes}. Use a source "
                                  "whose position is the same on every process, such as "
                                  "zj.Indexed, or restore the state without a position: "
                                  'only=".*".')
        return self.data_states[process % len(self.data_states)]

    @property
    def bytes(self) -> int:
        """The size of all leaves."""
        return sum(entry.bytes for entry in self.leaves.values())

    def sheets(self) -> tuple[Sheet, Sheet]:
        """Returns a table of the whole step, and a table of its leaves."""
        title = f"step {self.step}: {quantity(len(self.leaves), 'leaf')}, {size(self.bytes)}"
        rows = [(path, str(list(e.shape)), e.dtype, e.spec, f"{e.bytes:,}", e.digest)
                for path, e in self.leaves.items()]
        columns = ("leaf", "shape", "dtype", "spec", "bytes", "digest")
        return Sheet(title, ("", ""), self._summary()), Sheet("", columns, tuple(rows))

    def _summary(self) -> tuple[tuple[str, str], ...]:
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items())
        precision = _joined({k: v for k, v in (self.precision or {}).items() if v})
        stage = "" if self.stage is None else f", stage {self.stage}, {precision}"
        return (("saved from", f"mesh {mesh}{stage}"),
                ("optimizer", ", ".join(self.optimizer)),
                ("data", ", ".join(map(_as_text, self.data_states))),
                ("metrics", _as_text(self.metrics)),
                ("versions", _joined(self.versions)))

    def parts(self) -> list:
        return [part for sheet in self.sheets() for part in sheet.parts()]


def sha256(values: dict) -> str:
    """Returns the SHA-256 of JSON values, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def optimizer_kinds(state: Any) -> tuple[str, ...]:
    """Returns the kinds of state that the optax transform in a state keeps."""
    is_dict = isinstance(state, Mapping)
    opt_state = state.get("opt_state") if is_dict else getattr(state, "opt_state", None)
    return optimizer.kinds(opt_state)


def _entry(shape, dtype, kept=None, **rest) -> Entry:
    """Returns an entry from its JSON values.

    Raises:
      ValueError, TypeError: they do not describe an array.
    """
    if any(type(n) is not int or n < 0 for n in [*shape, *(kept or ())]):
        raise ValueError(f"it has a leaf of shape {shape}{f', kept as {kept}' if kept else ''}")
    return Entry(tuple(shape), str(np.dtype(dtype)), kept=tuple(kept) if kept else None, **rest)


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _as_text(value: Any) -> str:
    return json.dumps(json_values.encoded("", value))
