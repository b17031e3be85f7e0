"""Capacity planning: bytes, FLOPs and predicted times of a block, and which sessions fit into a GPU. No tensors."""
