"""The whole program, as users start it."""
