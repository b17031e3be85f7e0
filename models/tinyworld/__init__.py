"""A small world and the model that was trained on it: what `inferix generate` plays when no model is named."""
