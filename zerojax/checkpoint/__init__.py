"""Checkpoints: Orbax writes and reads the arrays, and a manifest beside them has their digests.

The only wing that keeps states on disk; it also exports and loads safetensors files.
"""
