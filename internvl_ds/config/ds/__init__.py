"""ds_config JSON: loaded, filled from the yacs tree, and checked."""
