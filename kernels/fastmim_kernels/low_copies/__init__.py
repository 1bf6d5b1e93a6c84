"""Low-precision copies of all weights of a step."""
