"""How good what a model makes is, measured against something that knows better."""
