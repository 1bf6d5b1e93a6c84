"""What a frozen encoder gives for probes and for others: tokens of its blocks, pooled or as maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .stream import normalise

Kept = TypeVar("Kept")


class Pooled(NamedTuple):
    """Of the tokens behind one block, float32."""

    cls: Tensor
    """(B, D) class token; of an encoder without one, the mean."""
    mean: Tensor
    """(B, D) mean of the patch tokens."""


class Tokens(NamedTuple):
    """What stands behind one block, float32."""

    cls: Tensor | None
    """(B, D) class token of a ViT."""
    patches: Tensor
    """(B, h, w, D)."""

    def pooled(self) -> Pooled:
        """Class token and mean."""
        mean = self.patches.mean((1, 2))
        return Pooled(mean if self.cls is None else self.cls, mean)


@torch.no_grad()
def block_features(
    encoder: Any, images: Tensor, blocks: Sequence[int], normed: bool, keep: Callable[[Tokens], Kept]
) -> list[Kept]:
    """What ``keep`` makes of the tokens behind each of these blocks, in the order of the encoder.

    Hooks look at the blocks of a plain forward pass, and keep at once: no map outlives its block unless it is kept.

    Args:
        encoder: Of :func:`fastmim.models.create_encoder`.
        images: (B, C, H, W) normalised.
        blocks: Numbers from 0 on.
        normed: Tokens pass the final norm first. In Swin only those of the last stage, as in iBOT's evaluation: those
            before have other widths.
        keep: Of the tokens of one block.
    """
    found: list[Kept] = []
    grid = tuple(edge // encoder.patch_size for edge in images.shape[2:])

    def look(block: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        width = block.norm1.normalized_shape[0]
        # SwinV2's last block of a stage may have gathered its map 2×2 for the merging of the next.
        x = outputs[0] if outputs[0].shape[-1] == width else _spread(outputs[0], width)
        found.append(keep(_tokens(encoder, x, grid, normed and width == encoder.num_features)))

    every = encoder.all_blocks()
    hooks = [every[number].register_forward_hook(look) for number in sorted(set(blocks))]
    try:
        encoder.forward_tokens(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def pooled_features(encoder: Any, images: Tensor, last: int, normed: bool) -> list[Pooled]:
    """One :class:`Pooled` for each of the ``last`` blocks of an encoder, the deepest at the end.

    Args:
        encoder, images, normed: As of :func:`block_features`.
        last: Blocks, counted from the end.

    Raises:
        ValueError: The encoder has fewer blocks.
    """
    count = len(encoder.all_blocks())
    if not 1 <= last <= count:
        raise ValueError(f"last={last}: this encoder has {count} block{'s' * (count != 1)}; give 1 to {count}")
    return block_features(encoder, images, range(count - last, count), normed, Tokens.pooled)


def _spread(x: Tensor, width: int) -> Tensor:
    """(B, h, w, 4D), gathered 2×2 in the order of patch merging (columns outside, rows inside) → (B, 2h, 2w, D)."""
    b, h, w, _ = x.shape
    return x.reshape(b, h, w, 2, 2, width).permute(0, 1, 4, 2, 3, 5).reshape(b, 2 * h, 2 * w, width)


def _tokens(encoder: Any, x: Tensor, grid: tuple[int, ...], normed: bool) -> Tokens:
    """Of a residual stream (B, 1 + L, D), the class token first, or (B, H, W, D)."""
    tokens = normalise(x, encoder.norm, encoder.impl)[1].float() if normed else x.float()
    if x.ndim == 3:
        return Tokens(tokens[:, 0], tokens[:, 1:].unflatten(1, grid))
    return Tokens(None, tokens)
