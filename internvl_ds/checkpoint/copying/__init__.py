"""Copies in host memory, from which background saves write."""
