"""Weights from outside a run: files, directories, tags, addresses."""
