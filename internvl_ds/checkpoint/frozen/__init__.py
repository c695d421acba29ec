"""Frozen parameters kept apart from a tag's other files: CHECKPOINT.FROZEN."""
