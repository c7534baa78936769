"""Safetensors files, opened to read parts of their tensors by name."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from zerojax.checkpoint import reading, safetensors
from zerojax.errors import CheckpointError, CorruptCheckpointError, MissingExtraError

Files = dict[pathlib.Path, list[str] | None]  # the tensors to read of each file; None is all
_LARGEST_INDEX = 100 * 2**20  # bytes
_NAMES = {code: dtype for dtype, code in safetensors.DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file; a part's bytes are read when it is asked for.

    Attributes:
      slices: the tensor as safetensors opens it.
      framework: the file's name of the framework that wrote it: "pt" is PyTorch.
    """

    slices: Any
    framework: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.slices.get_shape())

    @property
    def dtype(self) -> str:
        code: str = self.slices.get_dtype()
        return _NAMES.get(code, code)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part.

        Raises:
          CheckpointError: safetensors cannot make numpy arrays of the dtype.
        """
        sizes = [len(range(size)[at]) for size, at in zip(self.shape, index, strict=True)]
        if not math.prod(sizes):  # safetensors cannot read parts of size zero
            return np.zeros(sizes, self.dtype)
        try:
            return np.asarray(self.slices[index or ...])
        except AttributeError as error:
            raise CheckpointError(f"safetensors cannot make numpy arrays of {self.dtype} "
                                  f"({error}); save the file in bfloat16.") from None


@contextlib.contextmanager
def opened(path: pathlib.Path, follow_links: bool) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors by name.

    Args:
      path: a file, an index, or a directory that has one of either.
      follow_links: whether the files of an index may be links.

    Raises:
      CheckpointError: there is no such file, or a directory has several.
      CorruptCheckpointError: a file is damaged, or an index names files in another directory.
      MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors files need the package safetensors: pip install "
                                "'zerojax[export]'.") from None
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file, names in _files(path, follow_links).items():
            try:
                found = stack.enter_context(safe_open(str(file), "np"))
                framework = (found.metadata() or {}).get("format", "")
                wanted = found.keys() if names is None else names
                tensors |= {name: Tensor(found.get_slice(name), framework) for name in wanted}
            except (SafetensorError, OSError, ValueError) as error:
                if reading.is_transient(error):
                    raise
                raise CorruptCheckpointError(f"{file} is unreadable: {reading.brief(error)}."
                                             ) from error
        yield tensors


def _files(path: pathlib.Path, follow_links: bool) -> Files:
    if path.is_dir():
        path = _only_file(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    return _indexed(path, follow_links) if path.name.endswith(".json") else {path: None}


def _only_file(directory: pathlib.Path) -> pathlib.Path:
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    found = indexes or sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        some = ", ".join(file.name for file in found[:4])
        raise CheckpointError(f"{directory} has {len(found)} safetensors files or indexes "
                              f"({some}); name one.")
    return found[0]


def _indexed(path: pathlib.Path, follow_links: bool) -> Files:
    """Returns the files of an index."""
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than {_LARGEST_INDEX:,}")
        files: dict[pathlib.Path, Any] = {}
        for name, file in json.loads(path.read_text())["weight_map"].items():
            files.setdefault(_beside(path, file, follow_links), []).append(name)
        return files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not a usable index: {reading.brief(error)}."
                                     ) from error


def _beside(index: pathlib.Path, file: Any, follow_links: bool) -> pathlib.Path:
    """Returns the path of a file that an index names, which must be in the same directory."""
    if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
        raise ValueError(f"it names the file {file!r}, which is not the name of a .safetensors "
                         "file in its own directory")
    path = index.parent / file
    if path.is_symlink() and not follow_links:
        raise ValueError(f"{file} is a link to {os.readlink(path)}; to allow links, write "
                         "follow_links=True")
    if not path.is_file():
        raise ValueError(f"it names {file}, which is not a file in its directory")
    return path
