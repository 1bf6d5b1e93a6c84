"""What this processor multiplies, and with which library."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache(maxsize=1)
def has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()
