"""Keeps pytest from importing make.py, which needs torch and transformers."""

collect_ignore = ["make.py"]
