"""What a model computes, in textbook form, its sizes, and the names of its checkpoints."""
