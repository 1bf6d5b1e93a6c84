"""The MLP of a block, and GELU alone."""
