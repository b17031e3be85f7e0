"""Sessions: their state, controls, output, scheduling, and the thread that drives the engine."""
