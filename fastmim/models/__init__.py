"""Encoders on timm's parameter names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .dalle import DalleVAE
from .dvae import Autoencoder, DiscreteVAE
from .rules import AUTOENCODERS, check_architecture
from .sizes import FAMILIES, SIZES, expand_size
from .swin import SwinTransformer
from .swinv2 import SwinTransformerV2
from .vit import VisionTransformer

Encoder = SwinTransformer | VisionTransformer
ENCODERS: dict[str, type[Encoder | Autoencoder]] = {
    "swin": SwinTransformer, "swinv2": SwinTransformerV2, "vit": VisionTransformer, "dvae": DiscreteVAE,
    "dalle": DalleVAE,
}  # fmt: skip
"""The class of each family; its keyword arguments are those of ``create_encoder``."""

__all__ = [
    "AUTOENCODERS",
    "ENCODERS",
    "FAMILIES",
    "SIZES",
    "Autoencoder",
    "Encoder",
    "SwinTransformer",
    "SwinTransformerV2",
    "VisionTransformer",
    "check_encoder",
    "create_encoder",
    "encoder_settings",
    "expand_size",
]


def create_encoder(encoder: dict[str, Any], *, impl: str = "auto") -> Encoder:
    """Build an encoder from its keyword arguments; of "dvae" and "dalle" an :class:`Autoencoder`.

    Args:
        encoder: ``name`` (a key of :data:`ENCODERS` or of :data:`SIZES`) and the constructor's arguments.
        impl: Implementation of the ops inside, see :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: Unknown name or argument, or values that do not fit together.
    """
    kwargs = expand_size(encoder)
    name = kwargs.pop("name")
    cls: Any = ENCODERS[name]
    known = set(inspect.signature(cls).parameters) - {"impl"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise ValueError(
            f"encoder {unknown[0]}={kwargs[unknown[0]]!r}: {name} has no such argument; "
            f"it takes {', '.join(sorted(known))}"
        )
    built = cls(**kwargs, impl=impl)
    built.settings = encoder_settings(encoder)
    return built


def encoder_settings(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument that :func:`create_encoder` would build with: given ones over the size's over the defaults.

    ``name`` is the family. Nothing is built.

    Raises:
        ValueError: Unknown name.
    """
    kwargs = expand_size(encoder)
    parameters = inspect.signature(ENCODERS[kwargs["name"]]).parameters
    defaults = {key: p.default for key, p in parameters.items() if key != "impl"}
    return {**defaults, **kwargs}


def check_encoder(encoder: Mapping[str, Any]) -> None:
    """Refuse what :func:`create_encoder` would refuse of the architecture, without building it.

    Raises:
        ValueError: ``argument=value: what; fix`` in one line.
    """
    check_architecture(encoder_settings(encoder))
