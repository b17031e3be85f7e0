"""Models in textbook form, their sizes, and readers of their published checkpoints."""
