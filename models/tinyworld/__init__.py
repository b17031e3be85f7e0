"""The small world: its simulator, and the model trained on it, which is the default of `inferix generate`."""
