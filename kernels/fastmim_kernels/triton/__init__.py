"""Triton kernels and their launchers, one module per op. Imported lazily: only this package needs triton."""
