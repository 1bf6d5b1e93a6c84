"""What this processor multiplies, and with which library."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=4)
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` are oneDNN's here: with AVX-512 alone.

    Without it oneDNN has none of bfloat16 and raises, and in float32 MKL is the faster one by a tenth (Zen 3).
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@lru_cache(maxsize=1)
def has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


@lru_cache(maxsize=1)
def has_bfloat16_units() -> bool:
    """Whether a bfloat16 product takes half the time of a float32 one."""
    return onednn_multiplies(torch.bfloat16) and (has_amx() or torch.cpu._is_avx512_bf16_supported())
