"""The tensors from which each leaf of a target is made: their names, and how they are transformed.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from zerojax import errors
from zerojax.checkpoint import entries, rearranging, safetensors
from zerojax.checkpoint.entries import Entry
from zerojax.checkpoint.rearranging import View
from zerojax.checkpoint.target import misfit
from zerojax.checkpoint.tensor_files import Tensor
from zerojax.errors import CheckpointError

Transform = str | Callable[[np.ndarray], np.ndarray]
Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a leaf.

    Attributes:
      path: the path of the leaf.
      wanted: the shape and dtype of the leaf.
      name: the name of its tensor; a `*` counts an index of the leaf's first dimensions.
      transform: turns a tensor into the leaf; None if they are equal.
    """

    path: str
    wanted: Entry
    name: str
    transform: Transform | None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the part of the leaf that is made of one tensor."""
        return self.wanted.shape[self.name.count("*"):]

    def names(self) -> list[str]:
        """Returns the names of the tensors.

        Raises:
          CheckpointError: the leaf has no dimension, or no element, for a `*`.
        """
        counted = self.wanted.shape[:self.name.count("*")]
        if len(counted) < self.name.count("*") or 0 in counted:
            raise CheckpointError(f"rename makes {self.name!r} of {self.path}, but its shape "
                                  f"{list(self.wanted.shape)} has no indices for each *.")
        return [_numbered(self.name, index) for index in np.ndindex(*counted)]

    def view(self, tensors: Tensors) -> View:
        """Returns the leaf as a view of its tensors.

        Raises:
          CheckpointError: a pattern does not fit, or the tensors of a stack differ.
        """
        views = [self._transformed(tensors[name]) for name in self.names()]
        if len(kinds := {(view.shape, view.dtype) for view in views}) > 1:
            raise CheckpointError(f"{self.path} is a stack of the tensors {self.name}, but these "
                                  f"differ in shape or dtype: {sorted(kinds)}.")
        for size in reversed(self.wanted.shape[:self.name.count("*")]):
            views = [rearranging.Stacked(views[i:i + size]) for i in range(0, len(views), size)]
        return views[0]

    def _transformed(self, tensor: Tensor) -> View:
        if self.transform is None:
            return tensor
        if callable(self.transform):
            return rearranging.Computed(tensor, self.transform, self.tensor_shape)
        try:
            return rearranging.rearranged(self.transform, tensor, self.tensor_shape)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}, from {self.name}: {error}") from None


def _numbered(name: str, index: Sequence[int]) -> str:
    """Returns a name with numbers in place of its stars.

    >>> _numbered("h.*.experts.*.weight", (2, 0))
    'h.2.experts.0.weight'
    """
    numbers = iter(index)
    return re.sub(r"\*", lambda _: str(next(numbers)), name)


def sources(wanted: Mapping[str, Entry], rename: Mapping[str, str],
            transform: Mapping[str, Transform]) -> list[Source]:
    """Returns the source of each leaf.

    Args:
      wanted: the leaves' shapes and dtypes by path.
      rename, transform: as for `load_safetensors`.

    Raises:
      CheckpointError: an argument is invalid, or two leaves are the same part of one tensor.
    """
    _check_transforms(transform)
    histories = [safetensors.renamings(safetensors.dotted(p), rename) for p in wanted]
    found = [Source(p, entry, names[-1], _transform_of(names, transform))
             for (p, entry), names in zip(wanted.items(), histories, strict=True)]
    users: dict[tuple[str, Transform | None], list[str]] = {}
    for source in found:
        users.setdefault((source.name, source.transform), []).append(source.path)
    for (name, how), paths in users.items():
        if len(paths) > 1:
            _refuse_shared(name, how, paths)
    return found


def _refuse_shared(name: str, how: Transform | None, paths: Sequence[str]):
    given = "without a transform" if how is None else f"by the transform {how!r}"
    n, last = len(paths), safetensors.dotted(paths[0]).rpartition(".")[2]
    raise CheckpointError(f"{', '.join(paths)} would all be read from {name!r} {given}; rename "
                          f"them, or give each its part: '(0/{n} ...) in -> in ...' for the kernel "
                          f"of a fused linear layer of PyTorch, '(0/{n} ...) -> ...' for its bias, "
                          f"with a regex for each, such as r'query\\.{last}$'. If "
                          "two leaves share a whole tensor, give one of them the transform 'a b -> "
                          "a b'.")


def _check_transforms(transform: Mapping[str, Transform]):
    for regex, value in transform.items():
        if not (isinstance(value, str) or callable(value)):
            raise CheckpointError(f"transform={{{regex!r}: {value!r}}}: write a pattern, such as "
                                  "'out in -> in out', or a function of a numpy array.")
        try:
            re.compile(regex)
        except re.error as error:
            raise CheckpointError(f"transform has the invalid regular expression {regex!r}: "
                                  f"{error}.") from None


def _transform_of(names: Sequence[str], transform: Mapping[str, Transform]) -> Transform | None:
    """Returns the first transform whose regex occurs in one of a leaf's names, or None."""
    return next((value for regex, value in transform.items()
                 if any(re.search(regex, name) for name in names)), None)


def present(found: Sequence[Source], tensors: Tensors) -> list[Source]:
    """Returns the sources without integers of the model state that the files lack."""
    return [s for s in found if "float" in s.wanted.dtype or s.name in tensors
            or not s.path.startswith("model_state/")]


def views(where: str, found: Sequence[Source], tensors: Tensors, cast: bool) -> dict[str, View]:
    """Returns a view of the tensors for each leaf, by path.

    Args:
      where: the file, for errors.
      found: the sources.
      tensors: the tensors by name.
      cast: whether floating dtypes may differ.

    Raises:
      CheckpointError: a tensor is missing, does not fit its leaf, or may be transposed.
    """
    absent = {s.path: name for s in found for name in s.names() if name not in tensors}
    made = {s.path: s.view(tensors) for s in found if s.path not in absent}
    wanted = {s.path: s.wanted for s in found}
    given = {p: Entry(view.shape, view.dtype) for p, view in made.items()}
    lines = entries.differences(given, wanted, all_of_it=False, cast=cast)
    if lines:
        advice = similar(absent.values(), tensors) + _advice(given, wanted)
        raise CheckpointError(misfit(where, lines, advice))
    _check_squares(found, tensors)
    return made


def similar(absent: Iterable[str], names: Iterable[str]) -> str:
    """Returns a sentence with the names in the files that are most like some absent ones."""
    absent = list(absent)
    closest = {name: difflib.get_close_matches(name, names, 1, 0) for name in absent[:3]}
    if not closest:
        return ""
    return (f" The closest names in the files: {closest}; see rename."
            + _numbered_instead(absent[0], closest[absent[0]]))


def _numbered_instead(absent: str, closest: Sequence[str]) -> str:
    """Returns a sentence if an absent name lacks only the number of a layer."""
    stars = [(re.sub(r"\.\d+\.", ".*.", name, count=1), name) for name in closest]
    for star, name in stars:
        if star != name and star.replace(".*.", ".") == absent:
            return f" If the leaf is a stack of layers, rename it to {star!r}."
    return ""


def _advice(given: Mapping[str, Entry], wanted: Mapping[str, Entry]) -> str:
    """Returns sentences on leaves that differ in their dtype alone, or may be transposed."""
    pairs = [(entry, wanted[p]) for p, entry in given.items()]
    casts = any(a.shape == b.shape and a.dtype != b.dtype and entries.can_cast(a, b)
                for a, b in pairs)
    turned = any(a.shape != b.shape and sorted(a.shape) == sorted(b.shape) for a, b in pairs)
    return (" For another floating dtype, write cast=True." * casts
            + " For the kernels of PyTorch's linear layers, write "
              "transform={'kernel$': 'out in -> in out'}." * turned)


def _check_squares(found: Sequence[Source], tensors: Tensors):
    """Checks that no square kernel is read as it is from a file of PyTorch.

    PyTorch stores it transposed, and its shape does not show that.
    """
    for s in found:
        tensor = tensors[s.names()[0]]
        is_square = len(tensor.shape) > 1 and tensor.shape[-1] == tensor.shape[-2] > 1
        is_kernel = s.path.removesuffix("/value").endswith("kernel")  # NNX's states have a value
        is_ours = tensor.framework == "flax" or (tensor.framework != "pt"
                                                 and s.name.endswith("kernel"))
        if s.transform is None and is_square and is_kernel and not is_ours:
            raise CheckpointError(
                f"{s.path} would be read from {s.name}{list(tensor.shape)} as it is, but PyTorch "
                "stores the kernels of linear layers transposed. Write transform={'kernel$': 'out "
                "in -> in out'}, or 'in out -> in out' for a kernel that is not transposed.")


def warn_of_unused(where: str, found: Sequence[Source], tensors: Tensors) -> None:
    """Warns of tensors that no leaf is made of."""
    unused = sorted(set(tensors) - {name for s in found for name in s.names()})
    if unused:
        errors.warn(f"the target has no leaf for {len(unused)} of the {len(tensors)} tensors in "
                    f"{where}, such as {', '.join(unused[:3])}.")
