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
    SwinTransformerStage,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
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
    "SwinTransformerStage",
    "SwinTransformerV2Block",
    "SwinTransformerV2Stage",
    "VitBlock",
    "WindowAttention",
    "WindowAttentionV2",
    "accelerate",
]
