"""What leaves the engine: checkpoints written in the formats that other programs read."""
