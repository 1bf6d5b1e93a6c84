"""What is predicted of hidden pixels: the target itself, the loss of a prediction, and the picture that one makes.

Pixels are here; targets that are classes stand in :mod:`.class_targets`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.common.token_layout import patches_of
from fastmim_kernels.local_norm.op import local_statistics

from .gaps import valid_moments, window_statistics
from .losses import pixel_loss
from .masks import coarse_mask
from .pixel_heads import PixelHead

PATCH_EPS = 1e-6
"""Added to the variance of a patch (MAE, section 4.1)."""


class Target(nn.Module):
    """A head gives ``values`` numbers of it for each square of ``stride`` × ``stride`` pixels, a *predicted pixel*."""

    values: int
    stride: int
    impl: str

    def of(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised images → the (B, ·, H/s, W/s) of them that :meth:`loss` compares with.

        NaN in the images, no data, is NaN in the target.
        """
        raise NotImplementedError

    def loss(self, tokens: Tensor, head: PixelHead, target: Tensor, scored: Tensor) -> Tensor:
        """The mean error of the predicted pixels that hold a scored one, a float32 scalar.

        Args:
            tokens: (B, h, w, D) of :meth:`.PixelHead.tokens`.
            target: Of :meth:`of`.
            scored: (B, rows, columns) bool or 0/1 that divide the image.
        """
        raise NotImplementedError

    def read(self, prediction: Tensor) -> Tensor:
        """A head's (B, values, H/s, W/s) as (B, C, ·, ·) pixels of the target."""
        raise NotImplementedError

    def undo(self, pixels: Tensor, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels of the target of normalised ``images``, as a normalised image."""
        return pixels

    def identity(self) -> dict[str, Any]:
        """See :meth:`.Objective.identity`: of a target that comes from a file."""
        return {}

    def frozen_tensors(self) -> list[Tensor]:
        """See :meth:`.Objective.frozen_tensors`."""
        return []


class Pixels(Target):
    """The pixels themselves, raw (SimMIM, section 3.4) or normalised, and an error per value.

    Args:
        in_chans: C of the images.
        stride: Edge of a predicted pixel, which is the mean of the target over its square.
        window, patch: See :func:`normalised_target`.
        loss: A key of :data:`.losses.PIXEL_LOSSES`.
        beta: Error from which "smooth_l1" is linear: e²/(2β) below, e − β/2 from there on.
        has_gaps: NaN in the images is no data, see :func:`.losses.pixel_loss`; of a stride of 1 alone.
        impl: Implementation of the ops.
    """

    def __init__(
        self,
        in_chans: int,
        stride: int,
        window: int,
        patch: int,
        loss: str,
        beta: float,
        *,
        has_gaps: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.values, self.stride, self.impl, self.has_gaps = in_chans, stride, impl, has_gaps
        self.window, self.patch, self.error, self.beta = window, patch, loss, beta

    def of(self, images: Tensor) -> Tensor:
        """See :meth:`Target.of`."""
        how: dict[str, Any] = dict(has_gaps=self.has_gaps, impl=self.impl)
        return area_mean(normalised_target(images, self.window, self.patch, **how), self.stride)

    def loss(self, tokens: Tensor, head: PixelHead, target: Tensor, scored: Tensor) -> Tensor:
        """See :meth:`Target.loss`."""
        scored = coarse_mask(scored, (target.shape[2] * self.stride, target.shape[3] * self.stride), self.stride)
        layer = Layer(head.weight, head.bias)
        if self.beta != 1:  # the kernels' is that of β = 1: smooth_β(e) = β·smooth_1(e/β)
            layer, target = Layer(head.weight / self.beta, head.bias / self.beta), target / self.beta
        error = pixel_loss(self.error, self.has_gaps)
        loss = error(tokens, layer, target, scored, stride=head.stride, impl=self.impl)
        return loss if self.beta == 1 else loss * self.beta

    def read(self, prediction: Tensor) -> Tensor:
        """See :meth:`Target.read`."""
        return prediction

    def undo(self, pixels: Tensor, images: Tensor) -> Tensor:
        """By the true statistics of the image."""
        if not self.window and not self.patch:
            return pixels
        mean, std = target_statistics(images, self.window, self.patch, self.has_gaps)
        return pixels * std + mean


class Layer(NamedTuple):
    """A linear map."""

    weight: Tensor
    bias: Tensor


def normalised_target(images: Tensor, window: int, patch: int, *, has_gaps: bool = False, impl: str = "auto") -> Tensor:
    """Normalised images (B, C, H, W), each pixel by the statistics of the ``window`` × ``window`` around it.

    0 leaves them as they are (SimMIM, Xie et al. 2022); a window is SwinV2's target (Liu et al. 2022, section 4.1).
    With ``patch`` by those of the square of so many pixels that it lies in, see :func:`patch_statistics`. With
    ``has_gaps`` statistics are those of the pixels that are not NaN, and these stay NaN.
    """
    if window and not has_gaps:
        return fk.local_norm_target(images, window, impl=impl)
    if not window and not patch:
        return images
    mean, std = target_statistics(images, window, patch, has_gaps)
    return (images - mean) / std


def target_statistics(images: Tensor, window: int, patch: int, has_gaps: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation by which :func:`normalised_target` normalises each pixel, with one of both."""
    if patch:
        return patch_statistics(images, patch, has_gaps)
    return window_statistics(images, window) if has_gaps else local_statistics(images, window)


def patch_statistics(images: Tensor, patch: int, has_gaps: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and √(unbiased variance + 1e-6) over all channels of each square of ``patch`` pixels (MAE, section 4.1).

    With ``has_gaps`` of the values that are not NaN.

    Returns:
        Both (B, 1, H, W), where ``patch`` divides H and W of ``images``.
    """
    values = patches_of(images, patch).flatten(3)
    if has_gaps:
        mean, variance = (moment.squeeze(-1) for moment in valid_moments(values))
    else:
        variance, mean = torch.var_mean(values, -1, correction=1)
    both = torch.stack((mean, (variance + PATCH_EPS).sqrt()), 1)
    both = both.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return both[:, :1], both[:, 1:]


def area_mean(images: Tensor, edge: int) -> Tensor:
    """(B, C, H, W) → (B, C, H/edge, W/edge): the mean of each square."""
    return images if edge == 1 else F.avg_pool2d(images, edge)


def check_norm(norm_target: int, norm_patch: bool, size: tuple[int, int], stride: int) -> None:
    """Off, an odd window of at least two pixels, since one has no variance, or the tokens of ``stride`` pixels.

    Raises:
        ValueError: Names the nearest windows or sizes.
    """
    if norm_target and (norm_target % 2 == 0 or norm_target < 3):
        nearest = dict.fromkeys((max(norm_target - 1, 3), max(norm_target + 1, 3)))
        raise ValueError(
            f"norm_target={norm_target}: must be 0 (off) or an odd window of at least 3 pixels; "
            f"use {' or '.join(map(str, nearest))}"
        )
    if norm_patch and norm_target:
        raise ValueError(f"norm_patch=true: not with a window too, norm_target={norm_target}; use norm_target=0")
    if norm_patch and (size[0] % stride or size[1] % stride):
        near = [max(round(edge / stride), 1) * stride for edge in size]
        raise ValueError(
            f"norm_patch=true: images of {list(size)} are no whole tokens of {stride} pixels; use model.img_size={near}"
        )


def check_target_stride(target_stride: int, stride: int, size: tuple[int, int]) -> None:
    """Tokens of ``stride`` pixels, and images, are whole predicted pixels.

    Raises:
        ValueError: Names what fits.
    """
    common = math.gcd(stride, *size)
    if target_stride < 1 or common % target_stride:
        fits = [edge for edge in range(1, common + 1) if common % edge == 0]
        raise ValueError(
            f"target_stride={target_stride}: must divide the encoder's stride {stride} and the edges of the image "
            f"{list(size)}; use one of {', '.join(map(str, fits))}"
        )
