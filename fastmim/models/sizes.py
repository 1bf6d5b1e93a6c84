"""Published encoder sizes by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

_SWIN: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
# SwinV2-H and -G: Liu et al. 2022, section 4.1; g is the 1 B model of Xie et al. 2023 (data scaling).
_SWINV2_LARGE: dict[str, dict[str, Any]] = {
    "huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), extra_norm_period=6),
    "g": dict(embed_dim=448, depths=(2, 2, 18, 2), num_heads=(14, 28, 56, 112)),
    "giant": dict(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), extra_norm_period=6),
}
# ViT-Ti and -S: Touvron et al. 2021 (DeiT), table 1.
_VIT: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}
_SIMMIM_VIT = dict(name="vit", img_size=224, patch_size=16, init_values=0.1, shared_rel_pos_bias=True)

FAMILIES = ("swin", "swinv2", "vit", "dvae", "dalle")

SIZES: dict[str, dict[str, Any]] = {
    # Swin-L was pretrained with window 12, the smaller ones with 6 (SimMIM, appendix).
    **{
        f"swin_{k}": dict(v, name="swin", img_size=192, window_size=12 if k == "large" else 6) for k, v in _SWIN.items()
    },
    **{f"swinv2_{k}": dict(v, name="swinv2", img_size=192, window_size=12) for k, v in (_SWIN | _SWINV2_LARGE).items()},
    **{f"vit_{k}": dict(_SIMMIM_VIT, **v) for k, v in _VIT.items()},
}
"""Keyword arguments of ``create_encoder`` for each name; ``swinv2_giant`` is SwinV2-G (3.0 B)."""


def expand_size(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve ``encoder["name"]`` when it is a size; explicit keys win over the size's.

    Raises:
        ValueError: The name is missing or is neither a family nor a size.
    """
    name = encoder.get("name")
    if name in FAMILIES:
        return dict(encoder)
    if name not in SIZES:
        known = [*FAMILIES, *SIZES]
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name={name!r}: unknown encoder{hint} (use one of {', '.join(known)})")
    size = SIZES[name]
    return {**size, **encoder, "name": size["name"]}
