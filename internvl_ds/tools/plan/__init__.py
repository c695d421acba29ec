"""What a run will need of memory and disk, before a device is taken."""
