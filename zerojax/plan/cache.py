"""The compiler's answers on disk, each under a digest of everything that decides it.

A plan names the user's lines, so the files of the user's model count as well: a program whose
model has moved within its file is another one. A program planned from another line or notebook
cell is the same.
"""

import contextlib
import gzip
import hashlib
import json
import linecache
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from zerojax.hlo.program import Frame
from zerojax.plan import provenance
from zerojax.processes import fingerprint

FORMAT = 2  # of the answers: to be raised when the compiling process does something else
VARIABLE = "ZEROJAX_CACHE"
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_FILE = re.compile(r'"([^"\n]+)":\d+:\d+')
_SITE = re.compile(r"callsite\((#loc\d*) at (#loc\d*)\)")


def path_of(lowered: jax.stages.Lowered, request: Mapping[str, Any], target: str) -> pathlib.Path:
    """Returns the file of the answer for a program.

    Args:
      request: JSON values: the options, the mesh, where the arguments are.
      target: the description of the GPU that the compiler gets.
    """
    flags = os.environ.get("XLA_FLAGS")  # inherited by the compiling process
    known = [FORMAT, jax.__version__, target, flags, str(provenance.PACKAGE),
             *named_files(request["options"])]
    program = fingerprint.of_text(lowered.as_text())
    what = [known, request, program, sources(lowered.as_text(debug_info=True))]
    return folder() / "programs" / f"{_sha(json.dumps(what, sort_keys=True))}.json.gz"


def named_files(options: Mapping[str, Any]) -> list[str]:
    """Returns the digests of the files that options name, such as a profile."""
    paths = [pathlib.Path(value) for value in options.values() if isinstance(value, str) and value]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def load(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the answer in a file; None if there is none, or it is torn."""
    if not path.is_file():
        return None
    with contextlib.suppress(OSError, EOFError, ValueError, zlib.error):
        return unpacked(path.read_bytes())
    return None


def keep(path: pathlib.Path, answer: bytes) -> None:
    """Writes an answer whole or not at all. A folder that cannot be written costs the next plan
    its time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(answer)
        os.replace(file.name, path)


def packed(answer: Mapping[str, Any]) -> bytes:
    return gzip.compress(json.dumps(answer).encode(), 1)


def unpacked(data: bytes) -> dict[str, Any]:
    return json.loads(gzip.decompress(data))


def folder() -> pathlib.Path:
    """Returns the folder of everything that plans keep on disk."""
    if given := os.environ.get(VARIABLE):
        return pathlib.Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "zerojax"


def sources(module: str) -> list[str]:
    """Returns digests of the files of the user's model, from an MLIR module's text with
    locations."""
    users = [file for file in _files(module) if provenance.is_users(Frame(file, 0, ""))]
    return sorted(set(map(_source, users)))


def _source(file: str) -> str:
    """Returns the digest of a file's path and text; of a notebook's cell, whose path differs in
    every kernel, of its text."""
    place = "" if provenance.is_cell(pathlib.Path(file)) else file
    return _sha(place + "".join(linecache.getlines(file)))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(module: str) -> set[str]:
    """Returns the files that the operations of a module came from, without those that only asked
    for the plan."""
    aliases = dict(_ALIAS.findall(module))
    outside = set()
    for inner, outer in _SITE.findall(module):
        if str(provenance.ENTRY) in _named(aliases, _reach(aliases, inner)):
            outside |= _reach(aliases, outer)
    return _named(aliases, set(aliases) - outside)


def _named(aliases: Mapping[str, str], names: set[str]) -> set[str]:
    return {file for name in names for file in _FILE.findall(aliases[name])}


def _reach(aliases: Mapping[str, str], name: str) -> set[str]:
    """Returns a location and all locations that it is made of."""
    seen, queue = set(), [name]
    while queue:
        if (here := queue.pop()) in aliases and here not in seen:
            seen.add(here)
            queue += re.findall(r"#loc\d*", aliases[here])
    return seen
