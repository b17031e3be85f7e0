"""Exports: engines for other runtimes, and checkpoints in published formats."""
