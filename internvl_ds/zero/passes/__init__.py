"""What the forward and backward passes of an update used."""
