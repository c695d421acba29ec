"""Plans the memory and disk that a run will need, without a device."""
