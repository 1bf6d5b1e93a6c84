"""Encoders on timm's parameter names."""

from __future__ import annotations

import inspect
from typing import Any

from .sizes import FAMILIES, SIZES, expand_size
from .swin import SwinTransformer
from .vit import VisionTransformer

Encoder = SwinTransformer | VisionTransformer

__all__ = [
    "FAMILIES",
    "SIZES",
    "Encoder",
    "SwinTransformer",
    "VisionTransformer",
    "create_encoder",
    "expand_size",
]


def create_encoder(encoder: dict[str, Any], *, impl: str = "auto") -> Encoder:
    """Build an encoder from its keyword arguments.

    Args:
        encoder: ``name`` ("swin", "swinv2", "vit" or a key of :data:`SIZES`) and the constructor's arguments.
        impl: Implementation of the ops inside, see :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: Unknown name or argument, or values that do not fit together.
    """
    kwargs = expand_size(encoder)
    name = kwargs.pop("name")
    cls = VisionTransformer if name == "vit" else SwinTransformer
    if name != "vit":
        kwargs["version"] = 2 if name == "swinv2" else 1
    known = set(inspect.signature(cls).parameters) - {"impl"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise ValueError(
            f"encoder {unknown[0]}={kwargs[unknown[0]]!r}: {name} has no such argument; "
            f"it takes {', '.join(sorted(known - {'version'}))}"
        )
    return cls(**kwargs, impl=impl)
