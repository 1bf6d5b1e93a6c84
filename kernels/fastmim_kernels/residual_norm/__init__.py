"""Residual addition and LayerNorm."""
