"""KV cache: page pool, page tables, page tensors, sink averages and offload to host memory."""
