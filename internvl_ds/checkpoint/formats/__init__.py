"""The files in a tag, and the original's: how each is written and read. Knows no ranks."""
