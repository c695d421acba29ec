"""What of this machine and environment would bite a run."""
