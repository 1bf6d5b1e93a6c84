"""Losses. A new one is a function here and an entry of its table: every objective and the config then take its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastmim_kernels as fk
from fastmim_kernels.common.rows import cast, statistics_dtype
from fastmim_kernels.common.token_layout import EPS, LOSSES, cover, patchify, token_cells

from ..models.read_rows import masked_tokens
from .gaps import filled
from .masks import pixel_mask
from .pixel_heads import PixelHead, predict_pixels


class PixelLoss(Protocol):
    """Mean error of a linear head's pixels: ``Σ error·m / (Σ m + 1e-5) / C`` in float32 (SimMIM, section 3.4)."""

    def __call__(
        self, tokens: Tensor, head: Any, target: Tensor, mask: Tensor, *, stride: int, impl: str = "auto"
    ) -> Tensor:
        """A scalar.

        Args:
            tokens: (B, h, w, D), each of ``stride`` × ``stride`` pixels.
            head: D → C·stride² by its ``weight`` and ``bias``, see :class:`.pixel_heads.PixelHead`.
            target: (B, C, H, W) float; no gradient flows to it.
            mask: (B, H/p, W/p), true where pixels count.
            stride: Pixels per token edge.
            impl: Implementation of the ops.
        """


def _fused(loss: str) -> PixelLoss:
    """Head and loss in one op, which computes no pixel that does not count and stores no prediction."""

    def pixel_loss(
        tokens: Tensor, head: Any, target: Tensor, mask: Tensor, *, stride: int, impl: str = "auto"
    ) -> Tensor:
        weight, bias = head.weight, head.bias
        return fk.linear_masked_l1(tokens, weight, bias, target, mask, stride=stride, loss=loss, impl=impl)

    return pixel_loss


def pixelwise(error: Callable[[Tensor, Tensor], Tensor]) -> PixelLoss:
    """The loss of any ``error(prediction, target)`` per pixel, on torch's own ops, without a kernel of its own.

    Where the target is NaN, in a channel of a pixel, nothing counts: the mean is over the others.
    """

    def pixel_loss(
        tokens: Tensor, head: Any, target: Tensor, mask: Tensor, *, stride: int, impl: str = "auto"
    ) -> Tensor:
        size, channels = (target.shape[-2], target.shape[-1]), target.shape[1]
        prediction = predict_pixels(tokens, head, stride, size)
        counts = pixel_mask(mask, size) & ~target.isnan()
        total = error(prediction, cast(filled(target.detach()), prediction.dtype)).mul(counts).sum()
        return total / (counts.sum() + EPS * channels)

    return pixel_loss


PIXEL_LOSSES: dict[str, PixelLoss] = {name: _fused(name) for name in LOSSES}

_WITH_GAPS: dict[str, PixelLoss] = {
    "l1": pixelwise(partial(F.l1_loss, reduction="none")),
    "l2": pixelwise(partial(F.mse_loss, reduction="none")),
    "smooth_l1": pixelwise(partial(F.smooth_l1_loss, reduction="none")),
}
"""Instead of those whose op knows no gaps."""

if TYPE_CHECKING:
    PixelLossName = str
else:
    PixelLossName = Literal[tuple(PIXEL_LOSSES)]


def pixel_loss(name: str, has_gaps: bool = False) -> PixelLoss:
    """A loss by its name; with ``has_gaps`` for targets in which NaN is no data.

    It is then the mean of the error over the pixels that are masked and valid, each channel by itself, and 0, with a
    gradient of 0, where there is none. As every loss here it is a rank's own: gradients are averaged over ranks, so
    that a rank weighs the same whatever it has of valid pixels.
    """
    return _WITH_GAPS[name] if has_gaps and name in _WITH_GAPS else PIXEL_LOSSES[name]


LOGITS_AT_ONCE = 1 << 20
"""Of an image that :func:`class_loss` holds, 4 MiB in float32: 512 colours of 192 × 192 pixels are 72 MiB."""


def class_loss(
    tokens: Tensor,
    head: PixelHead,
    target: Tensor,
    mask: Tensor,
    *,
    classify: Callable[[Tensor], Tensor],
    groups: int,
    impl: str = "auto",
) -> Tensor:
    """Mean cross-entropy of the classes of pixels: ``Σ CE·m / (Σ m + 1e-5)``, CE averaged over groups of classes.

    Logits are made some tokens at a time, as many times for any batch, and where that is more than once, again in the
    backward pass. On a CPU those of tokens without a pixel that counts are not made at all.

    Args:
        tokens: (B, h, w, D), each of ``head.stride`` × ``head.stride`` pixels.
        head: D → groups·classes·stride².
        target: (B, ·, H, W), from which ``classify`` makes (n, groups, m) int64 classes of (n, ·, m).
        mask: (B, rows, columns) bool or 0/1 that divide H and W, true where pixels count.
        groups: Classifications of each pixel.

    Returns:
        A scalar, float32 (float64 of float64 tokens).
    """
    size, grid, stride = (target.shape[2], target.shape[3]), (tokens.shape[1], tokens.shape[2]), head.stride
    cells = token_cells(mask.bool(), size, grid, stride).flatten(0, 2)
    pixels = patchify(cover(grid, target.detach(), stride), stride).flatten(0, 2).unflatten(1, (target.shape[1], -1))
    x, classes = tokens.flatten(0, 2), head.values // groups
    rows = masked_tokens(mask, size, grid, stride)
    if rows is not None:
        x, pixels, cells = (tensor.index_select(0, rows) for tensor in (x, pixels, cells))
    weight = cells.repeat_interleave(stride // cells.shape[1], 1).repeat_interleave(stride // cells.shape[2], 2)

    def chunk(x: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
        logits = fk.linear(x, head.weight, head.bias, impl=impl).view(len(x), groups, classes, stride**2)
        logits = cast(logits, statistics_dtype(logits.dtype)).transpose(1, 2)
        with torch.no_grad():
            ids = classify(pixels)
        error = F.cross_entropy(logits, ids, reduction="none")
        return error.mean(1).mul(weight).sum()

    weight = weight.flatten(1).to(statistics_dtype(tokens.dtype))
    count = grid[0] * grid[1]
    least = min(-(-count * head.out_features // LOGITS_AT_ONCE), count)
    times = next(n for n in range(least, count + 1) if count % n == 0)
    parts = list(zip(*(tensor.tensor_split(times) for tensor in (x, pixels, weight)), strict=True))
    if times == 1:
        total = chunk(*parts[0])
    else:
        again: Any = dict(use_reentrant=False, preserve_rng_state=False)
        total = torch.stack([checkpoint(chunk, *part, **again) for part in parts]).sum()
    return total / (weight.sum() + EPS)
