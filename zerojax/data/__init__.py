"""Batches: read from a source ahead of their use, put on the devices, split into microbatches.

`feeding` has the feed that a training loop iterates over. It takes batches from `prefetch`, a
thread on which `loading` makes them from the source. `batch` checks, shards and splits them.
"""
