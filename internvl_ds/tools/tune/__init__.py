"""Finds a fast ds_config by real short runs."""
