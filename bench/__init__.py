"""Benchmarks of kernels, blocks and streams, and the compile gate. Outputs are checked before they are timed."""
