"""MAGI-1: transformer, checkpoints, decoder, text encoder and presets."""
