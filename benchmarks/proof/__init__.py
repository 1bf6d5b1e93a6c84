"""What a GPU must show before its kernels are trusted: parts, each in a process of its own, and one report.

``benchmarks/gpu_proof.py`` is the command. Nothing here needs more than torch, triton, timm, safetensors and numpy.
"""
