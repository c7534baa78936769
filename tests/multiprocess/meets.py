"""Joins, or says why not, and how long that took.

    python meets.py KEYWORDS_AS_JSON
"""

import json
import sys
import time

import jax

import zerojax as zj
from zerojax.processes import fingerprint

if __name__ == "__main__":
    keywords = json.loads(sys.argv[1])
    if "versions" in keywords:
        told = fingerprint.versions() | keywords.pop("versions")
        fingerprint.versions = lambda: told
    if keywords.pop("late", False):
        jax.devices()
    again = keywords.pop("again", False)
    print("meeting", flush=True)
    started = time.perf_counter()
    try:
        zj.initialize(**keywords)
        print("joined", jax.process_index(), jax.process_count(), jax.device_count(), flush=True)
        if again:
            same = ["same" if zj.initialize(**more) is zj.initialize() else "another" for more in ({}, keywords)]
            print("again:", ", ".join(same), flush=True)
            try:
                zj.initialize(heartbeat_timeout=5)
            except zj.ClusterError as error:
                print("again:", error, flush=True)
    except zj.ClusterError as error:
        print(f"{time.perf_counter() - started:.1f} s: {error}", flush=True)
        sys.exit(3)
