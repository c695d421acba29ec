"""What of this machine and environment would break a run."""
