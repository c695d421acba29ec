"""Frozen parameters apart from a tag's other files: CHECKPOINT.FROZEN."""
