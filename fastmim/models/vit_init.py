"""First weights of a ViT, as the published codes draw them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import trunc_normal_


@torch.no_grad()
def init_vit(vit: Any, init: str) -> None:
    """Fill the weights of a :class:`.vit.VisionTransformer` in place; see :data:`INITS`."""
    INITS[init](vit)


def check_init(init: str) -> None:
    """Refuse an unknown initialisation."""
    if init not in INITS:
        raise ValueError(f"init={init!r}: must be one of {', '.join(INITS)}")


@torch.no_grad()
def xavier_linears(module: nn.Module) -> None:
    """Every Linear inside: weight Xavier-uniform (Glorot & Bengio 2010), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _learned_tokens(vit: Any) -> list[Tensor]:
    learned = (vit.cls_token, vit.mask_token, vit.pos_embed)
    return [token for token in learned if token is not None and token.requires_grad]


def _truncated(vit: Any, kinds: Any, bound: float) -> None:
    """Normal of std 0.02 truncated at ±bound, biases 0, of these kinds of layers and of the learned tokens."""
    for module in vit.modules():
        if isinstance(module, kinds):
            trunc_normal_(module.weight, std=0.02, bound=bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in _learned_tokens(vit):
        trunc_normal_(token, std=0.02, bound=bound)


def _simmim(vit: Any) -> None:
    """Truncated at ±std, the residual outputs of block i divided by √(2i)."""
    _truncated(vit, (nn.Linear, nn.Conv2d), 0.02)
    for i, block in enumerate(vit.blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2.0 * i))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * i))


def _timm(vit: Any) -> None:
    """Truncated at ±2, and the patch projection as torch makes it."""
    _truncated(vit, (nn.Linear,), 2.0)


def _mae(vit: Any) -> None:
    """Xavier-uniform Linear layers and patch projection, which is one too; the tokens normal of std 0.02."""
    xavier_linears(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.view(vit.embed_dim, -1))
    for token in _learned_tokens(vit):
        nn.init.normal_(token, std=0.02)


def _moco(vit: Any) -> None:
    """Xavier-uniform, of query, key and value as three matrices and of the patch projection as its rows suggest.

    The projection is U(±√(6/(C·p² + D))) without bias, as MoCo v3 freezes it; the class token has std 1e-6.
    """
    xavier_linears(vit)
    for block in vit.blocks:
        for matrix in block.attn.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(matrix)
    projection = vit.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(vit.embed_dim, -1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    for token in _learned_tokens(vit):
        nn.init.normal_(token, std=1e-6)


INITS: dict[str, Callable[[Any], None]] = {"simmim": _simmim, "timm": _timm, "mae": _mae, "moco": _moco}
"""Of SimMIM and BEiT; of timm's ViT, DINO and iBOT; of MAE; of MoCo v3."""
