"""Block graphs of a model and a preset, the keys under which they are stored, and the graph store."""
