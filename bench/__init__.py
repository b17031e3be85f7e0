"""Measuring: kernels, what they compile to, blocks and streams. Nothing is timed that has not just been checked."""
