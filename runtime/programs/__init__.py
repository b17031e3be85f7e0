"""From a model and a scheme to block graphs, their lowered programs, and the store that keeps them."""
