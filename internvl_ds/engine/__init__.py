"""The engine behind the original's names: registry, precision, gradient norm, average."""
