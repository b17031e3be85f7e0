"""Executors and whatever else owns device memory during a pass: launcher, decoder, adapters, loading of weights."""
