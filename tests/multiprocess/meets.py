"""Joins, or says why not, and how long that took.

    python meets.py KEYWORDS_AS_JSON
"""

import json
import sys
import time

import jax

import zerojax as zj
from zerojax import fingerprint

if __name__ == "__main__":
    keywords = json.loads(sys.argv[1])
    if "versions" in keywords:
        told = fingerprint.versions() | keywords.pop("versions")
        fingerprint.versions = lambda: told
    started = time.perf_counter()
    try:
        zj.initialize(**keywords)
        print("joined", jax.process_index(), jax.process_count(), jax.device_count(), flush=True)
    except zj.ClusterError as error:
        print(f"{time.perf_counter() - started:.1f} s: {error}", flush=True)
        sys.exit(3)
