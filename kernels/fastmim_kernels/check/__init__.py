"""Proofs of the kernels: a self-test on the GPU at hand, ahead-of-time compilation. Nobody below imports it."""
