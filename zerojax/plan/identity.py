"""What a traced program is, wherever it was traced from: a digest without source lines, and of the files that those are in.

A plan names the user's lines, so a program whose model has moved in its file is another; one that is planned from another line
or notebook cell is the same.
"""

import hashlib
import linecache
import pathlib
import re
from collections.abc import Mapping

from zerojax.hlo.program import Frame
from zerojax.plan import provenance

_LOCATION = re.compile(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*")*\))*\)')
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_FILE = re.compile(r'"([^"\n]+)":\d+:\d+')
_SITE = re.compile(r"callsite\((#loc\d*) at (#loc\d*)\)")


def digest(module: str) -> list[str]:
    """Of an MLIR module's text with locations: its own digest, then those of the files of the user's model.

    >>> here = digest('func @f() loc("a.py":1:2 to :3)')
    >>> here == digest('func @f() loc("a.py":9:2 to :3)'), here == digest('func @g() loc("a.py":1:2 to :3)')
    (True, False)
    """
    plain = _LOCATION.sub("", "\n".join(line for line in module.splitlines() if not line.startswith("#loc")))
    sources = sorted({_source(file) for file in _files(module) if provenance.is_users(Frame(file, 0, ""))})
    return [_sha(plain), str(provenance.PACKAGE), *sources]


def _source(file: str) -> str:
    """Of a file, by its place and text; of a notebook's cell, which has another place in every kernel, by its text."""
    cell = provenance.is_cell(pathlib.Path(file))
    return _sha(("" if cell else file) + "".join(linecache.getlines(file)))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(module: str) -> set[str]:
    aliases = dict(_ALIAS.findall(module))
    files = lambda names: {file for name in names for file in _FILE.findall(aliases[name])}
    outside = set()
    for inner, outer in _SITE.findall(module):
        if str(provenance.ENTRY) in files(_reach(aliases, inner)):
            outside |= _reach(aliases, outer)
    return files(set(aliases) - outside)


def _reach(aliases: Mapping[str, str], name: str) -> set[str]:
    """A location and all that it is made of."""
    seen, queue = set(), [name]
    while queue:
        if (here := queue.pop()) in aliases and here not in seen:
            seen.add(here)
            queue += re.findall(r"#loc\d*", aliases[here])
    return seen
