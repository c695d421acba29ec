"""Probes of this machine and environment for what would break a run."""
