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


def name_of(path: str, rename: Mapping[str, str]) -> str:
    """Returns the tensor name of a leaf.

    That is its path without "params" or "model_state", joined by dots, in which each regex of
    `rename` is replaced, in order.

    >>> name_of("params/blocks/kernel", {r"^blocks": "h", r"kernel$": "weight"})
    'h.weight'
    """
    name = re.sub(r"^(params|model_state)/", "", path).replace("/", ".")
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def renamed(paths: Iterable[str], rename: Mapping[str, str]) -> list[str]:
    """Returns the tensor name of each leaf.

    Raises:
      CheckpointError: `rename` is invalid.
    """
    try:
        return [name_of(path, rename) for path in paths]
    except re.error as error:
        raise CheckpointError(f"rename={dict(rename)!r} has an invalid regular expression or "
                              f"replacement: {error}.") from None


def names_of(paths: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Returns the tensor names of leaves by path.

    Raises:
      CheckpointError: two names are equal or one is reserved, or `rename` is invalid.
    """
    names = dict(zip(paths, renamed(paths, rename), strict=True))
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
