"""An output directory and its tags: found, published, kept, checked, removed. Knows no ranks."""
