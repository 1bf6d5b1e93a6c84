"""What a frozen encoder gives for probes: pooled tokens of its last blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stream import normalise


class Pooled(NamedTuple):
    """Of the tokens behind one block, float32."""

    cls: Tensor
    """(B, D) class token; of an encoder without one, the mean."""
    mean: Tensor
    """(B, D) mean of the patch tokens."""


@torch.no_grad()
def pooled_features(encoder: Any, images: Tensor, last: int, normed: bool) -> list[Pooled]:
    """One :class:`Pooled` for each of the ``last`` blocks of an encoder, the deepest at the end.

    Hooks look at the blocks of a plain forward pass, and pool at once: no map outlives its block.

    Args:
        encoder: Of :func:`fastmim.models.create_encoder`.
        images: (B, C, H, W) normalised.
        last: Blocks, counted from the end.
        normed: Tokens pass the final norm first. In Swin only those of the last stage, as in iBOT's evaluation: those
            before have other widths.

    Raises:
        ValueError: The encoder has fewer blocks.
    """
    blocks = encoder.all_blocks()
    if not 1 <= last <= len(blocks):
        raise ValueError(f"last={last}: this encoder has {len(blocks)} blocks; give 1 to {len(blocks)}")
    found: list[Pooled] = []

    def look(block: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        width = block.norm1.normalized_shape[0]
        # SwinV2's last block of a stage may have gathered its map 2×2 for the merging of the next.
        x = outputs[0].unflatten(-1, (-1, width)).flatten(-3, -2) if outputs[0].shape[-1] != width else outputs[0]
        found.append(_pooled(encoder, x, normed and width == encoder.num_features))

    hooks = [block.register_forward_hook(look) for block in blocks[-last:]]
    try:
        encoder.forward_tokens(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _pooled(encoder: Any, x: Tensor, normed: bool) -> Pooled:
    """Of a residual stream (B, 1 + L, D), the class token first, or (B, H, W, D)."""
    tokens = normalise(x, encoder.norm, encoder.impl)[1].float() if normed else x.float()
    if x.ndim == 3:
        return Pooled(tokens[:, 0], tokens[:, 1:].mean(1))
    mean = tokens.mean((1, 2))
    return Pooled(mean, mean)
