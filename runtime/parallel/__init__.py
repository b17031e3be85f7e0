"""Several ranks for one world: processes, control messages, process groups, and the worker that joins them."""
