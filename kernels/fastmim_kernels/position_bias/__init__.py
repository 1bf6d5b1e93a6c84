"""Attention biases of Swin and SwinV2, of all blocks at once."""
