"""Calls `initialize`, once or twice; prints whether the process has joined, or the error.

    python meets.py ARGUMENTS_AS_JSON
"""

import json
import logging
import sys

import jax

import zerojax as zj


def repeat(arguments):
    """Calls `initialize` without arguments, with the same and with others."""
    job = zj.initialize()
    same = ["same" if zj.initialize(**more) is job else "another" for more in ({}, arguments)]
    print("again:", ", ".join(same), flush=True)
    try:
        zj.initialize(heartbeat_timeout=5)
    except zj.ClusterError as error:
        print("again:", error, flush=True)


def main(arguments, late=False, again=False):
    logging.basicConfig(level=logging.INFO)
    if late:
        jax.devices()
    try:
        zj.initialize(**arguments)
    except zj.ClusterError as error:
        print("error:", error, flush=True)
        sys.exit(3)
    print("joined", jax.process_index(), jax.process_count(), flush=True)
    if again:
        repeat(arguments)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    flags = {name: options.pop(name) for name in ("late", "again") if name in options}
    main(options, **flags)
