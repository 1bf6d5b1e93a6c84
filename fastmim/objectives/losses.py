"""Losses. A new one is a function here and an entry of its table: every objective and the config then take its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.common.token_layout import EPS, LOSSES

from .heads import predict_pixels
from .masks import pixel_mask


class PixelLoss(Protocol):
    """Mean error of a linear head's pixels: ``Σ error·m / (Σ m + 1e-5) / C`` in float32 (SimMIM, section 3.4)."""

    def __call__(
        self, tokens: Tensor, head: nn.Linear, target: Tensor, mask: Tensor, *, stride: int, impl: str = "auto"
    ) -> Tensor:
        """A scalar.

        Args:
            tokens: (B, h, w, D), each of ``stride`` × ``stride`` pixels.
            head: D → C·stride², see :func:`~fastmim.objectives.heads.pixel_head`.
            target: (B, C, H, W) float; no gradient flows to it.
            mask: (B, H/p, W/p), true where pixels count.
            stride: Pixels per token edge.
            impl: Implementation of the ops.
        """


def _fused(loss: str) -> PixelLoss:
    """Head and loss in one op, which computes no pixel that does not count and stores no prediction."""

    def pixel_loss(
        tokens: Tensor, head: nn.Linear, target: Tensor, mask: Tensor, *, stride: int, impl: str = "auto"
    ) -> Tensor:
        weight, bias = head.weight, head.bias
        return fk.linear_masked_l1(tokens, weight, bias, target, mask, stride=stride, loss=loss, impl=impl)

    return pixel_loss


def pixelwise(error: Callable[[Tensor, Tensor], Tensor]) -> PixelLoss:
    """The loss of any ``error(prediction, target)`` per pixel, on torch's own ops, without a kernel of its own."""

    def pixel_loss(
        tokens: Tensor, head: nn.Linear, target: Tensor, mask: Tensor, *, stride: int, impl: str = "auto"
    ) -> Tensor:
        size = (target.shape[-2], target.shape[-1])
        prediction = predict_pixels(tokens, head, stride, size)
        counts = pixel_mask(mask, size)
        total = error(prediction, target.detach().float()).mul(counts).sum()
        return total / (counts.sum() + EPS) / target.shape[1]

    return pixel_loss


PIXEL_LOSSES: dict[str, PixelLoss] = {name: _fused(name) for name in LOSSES}

if TYPE_CHECKING:
    PixelLossName = str
else:
    PixelLossName = Literal[tuple(PIXEL_LOSSES)]
