"""Checkpoints: Orbax writes and reads the arrays, and a manifest beside them has their digests.

The only wing that keeps states on disk, and snapshots of them in the memory of the hosts. It also
exports and loads safetensors files.
"""
