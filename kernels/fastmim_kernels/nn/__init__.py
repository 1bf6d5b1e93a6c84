"""Drop-in modules for timm's Swin, SwinV2 and ViT, and :func:`accelerate`, which puts them into a model.

Each is a subclass of timm's module of that name with the same arguments, parameter names and state dict; ``impl=`` is
that of the ops. Importing this package imports timm.
"""

from .parts import Mlp, ResidualNorm
from .swap import Report, accelerate
from .swin import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    SwinTransformerV2Block,
    WindowAttention,
    WindowAttentionV2,
)
from .vit import VitBlock

__all__ = [
    "Mlp",
    "PatchMerging",
    "PatchMergingV2",
    "Report",
    "ResidualNorm",
    "SwinTransformerBlock",
    "SwinTransformerV2Block",
    "VitBlock",
    "WindowAttention",
    "WindowAttentionV2",
    "accelerate",
]
