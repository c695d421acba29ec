"""What a run tells of itself while it trains: the log, the bar, the curves, the time of updates."""
