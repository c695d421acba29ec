"""Steps timm's and torch's Muon at ZeRO stages 1 to 3, where ranks have parts of a matrix."""
