"""Continuous relative position bias of SwinV2 (Swin Transformer V2, section 3.3), all blocks of a stage at once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import resolve


def cpb_bias(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *,
             impl: str = "auto") -> Tensor:
    """``16·sigmoid(relu(coords·W1ᵀ + b1)·W2ᵀ)`` looked up at ``index``, for L blocks.

    Args:
        coords: (T, 2) log-spaced relative coordinates, T = (2·wh − 1)(2·ww − 1).
        index: (N, N) int64 row of ``coords`` of each query/key pair.
        weight1: (L, K, 2) and bias1: (L, K), first layer of each block's MLP.
        weight2: (L, heads, K), second layer.

    Returns:
        (L, heads, N, N) float32 (float64 for float64 input): the additive attention bias of each block.

    Raises:
        ValueError: Shapes do not belong together.
    """
    if weight1.ndim != 3 or weight1.shape[2] != coords.shape[-1] or bias1.shape != weight1.shape[:2] \
            or weight2.ndim != 3 or weight2.shape[::2] != bias1.shape:
        raise ValueError(
            "cpb_bias: weight1 must be (L, K, 2), bias1 (L, K), weight2 (L, heads, K), got "
            f"{tuple(weight1.shape)}, {tuple(bias1.shape)}, {tuple(weight2.shape)}"
        )
    function = resolve("cpb_bias", impl, _IMPLEMENTATIONS, coords.device)
    # The MLP is tiny and its output decides logits of magnitude 16: always full precision.
    with torch.autocast(coords.device.type, enabled=False):
        return function(coords, index, weight1, bias1, weight2)


def _torch(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    hidden = torch.baddbmm(bias1[:, None], coords.expand(weight1.shape[0], -1, -1), weight1.mT).relu_()
    table = torch.sigmoid(weight2 @ hidden.mT) * 16
    return table.index_select(2, index.reshape(-1)).unflatten(2, index.shape)


_IMPLEMENTATIONS = {"torch": _torch, "reference": reference.cpb_bias}
