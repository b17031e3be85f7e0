"""The Wan family: causal transformer, streaming VAE, sizes and checkpoint formats."""
