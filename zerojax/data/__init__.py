"""Batches: from a source, ahead of their use, to the devices, and into microbatches."""
