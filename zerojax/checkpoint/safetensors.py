"""The safetensors format: its names of dtypes, and the names of a checkpoint's leaves in it.

A file has the length of its header (8 bytes), a JSON header with the dtype, shape and offsets of
each tensor, and the tensors' bytes, row by row.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from zerojax.errors import CheckpointError

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
          "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16",
          "uint8": "U8", "bool": "BOOL"}


def dotted(path: str) -> str:
    """Returns the name of a leaf: its path without "params" or "model_state", joined by dots.

    >>> dotted("params/blocks/kernel")
    'blocks.kernel'
    """
    return re.sub(r"^(params|model_state)/", "", path).replace("/", ".")


def renamed(names: Iterable[str], rename: Mapping[str, str]) -> list[str]:
    """Returns names in which each regex of `rename` is replaced, in order.

    Raises:
      CheckpointError: `rename` is invalid.

    >>> renamed(["blocks.kernel"], {r"^blocks": "h", r"kernel$": "weight"})
    ['h.weight']
    """
    return [renamings(name, rename)[-1] for name in names]


def renamings(name: str, rename: Mapping[str, str]) -> list[str]:
    """Returns a name, and what it becomes after each regex of `rename`.

    Raises:
      CheckpointError: `rename` is invalid.
    """
    names = [name]
    try:
        for pattern, replacement in rename.items():
            names.append(re.sub(pattern, replacement, names[-1]))
    except re.error as error:
        raise CheckpointError(f"rename={dict(rename)!r} has an invalid regular expression or "
                              f"replacement: {error}.") from None
    return names


def names_of(paths: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Returns the tensor names of leaves by path.

    Raises:
      CheckpointError: two names are equal or one is reserved, or `rename` is invalid.
    """
    names = dict(zip(paths, renamed(map(dotted, paths), rename), strict=True))
    owners: dict[str, str] = {}
    for path, name in names.items():
        if name == "__metadata__":
            raise CheckpointError(f"rename={dict(rename)!r} names {path} '__metadata__', which is "
                                  "reserved in safetensors; write another name.")
        if name in owners:
            raise CheckpointError(f"{owners[name]} and {path} would both be named {name!r}; rename "
                                  "one of them.")
        owners[name] = path
    return names
