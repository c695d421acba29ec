"""A script with the original's call sites, plain and ported, beside each other."""
