"""Encoders on timm's parameter names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .rules import check_architecture
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
    "check_encoder",
    "create_encoder",
    "encoder_settings",
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


def encoder_settings(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument that :func:`create_encoder` would build with: given ones over the size's over the defaults.

    ``name`` is the family. Nothing is built.

    Raises:
        ValueError: Unknown name.
    """
    kwargs = expand_size(encoder)
    cls = VisionTransformer if kwargs["name"] == "vit" else SwinTransformer
    own = ("impl", "version")
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items() if key not in own}
    return {**defaults, **kwargs}


def check_encoder(encoder: Mapping[str, Any]) -> None:
    """Refuse what :func:`create_encoder` would refuse of the architecture, without building it.

    Raises:
        ValueError: ``argument=value: what; fix`` in one line.
    """
    check_architecture(encoder_settings(encoder))
