"""What leaves for other programs: engines of other runtimes, and checkpoints in published formats."""
