"""The KV cache: page ids, page tables, page tensors, sink averages and offload to host memory."""
