"""Records of blocks and controls, metrics, and the profile of a block graph."""
