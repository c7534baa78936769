"""Keeping a state: arrays by Orbax, a manifest beside them with a digest of each, and safetensors for others."""
