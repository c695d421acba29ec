"""Ranks: the process group, meetings through its store, launchers, signals, preemption."""
