"""Writers of checkpoints in the formats that other programs read."""
