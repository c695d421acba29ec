"""What the training program reads: image folders, lists and archives, and how each is measured."""
