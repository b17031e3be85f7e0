"""Executors, launcher, decode pipeline, LoRA adapter and loading: owners of device memory other than KV pages."""
