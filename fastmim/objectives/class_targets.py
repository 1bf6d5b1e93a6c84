"""Targets that are classes: bins of each channel, clusters of colours, a tokenizer's codes (SimMIM, section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .clusters import ColourClusters
from .losses import class_loss
from .masks import coarse_mask
from .pixel_heads import PixelHead
from .targets import Target, area_mean
from .tokenizer import Tokenizer

LEVELS = 256
"""Of an 8-bit sample."""


class Classes(Target):
    """One of ``classes`` for each predicted pixel and each of ``groups``; the loss is the mean cross-entropy.

    Args:
        stride: Edge of a predicted pixel.
        mean, std: (C, 1, 1) statistics that the images are normalised by.
        impl: Implementation of the ops.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, groups: int, classes: int, stride: int, mean: Tensor, std: Tensor, impl: str) -> None:
        super().__init__()
        self.groups, self.classes, self.values = groups, classes, groups * classes
        self.stride, self.impl = stride, impl
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("std", std.clone(), persistent=False)

    def of(self, images: Tensor) -> Tensor:
        """The mean colour of each predicted pixel, in [0, 1]."""
        return area_mean(images * self.std + self.mean, self.stride)

    def loss(self, tokens: Tensor, head: PixelHead, target: Tensor, scored: Tensor) -> Tensor:
        """See :meth:`.Target.loss`."""
        scored = coarse_mask(scored, (target.shape[2] * self.stride, target.shape[3] * self.stride), self.stride)
        return class_loss(tokens, head, target, scored, classify=self.classify, groups=self.groups, impl=self.impl)

    def read(self, prediction: Tensor) -> Tensor:
        """The colours of the likeliest classes, normalised."""
        return (self.colours(self.likeliest(prediction)) - self.mean) / self.std

    def likeliest(self, prediction: Tensor) -> Tensor:
        """A head's (B, values, h, w) → (B, groups, h, w) int64."""
        return prediction.unflatten(1, (self.groups, self.classes)).argmax(2)

    def classify(self, target: Tensor) -> Tensor:
        """(n, ·, m) values of :meth:`of` → (n, groups, m) int64."""
        raise NotImplementedError

    def colours(self, ids: Tensor) -> Tensor:
        """(B, groups, h, w) classes → (B, C, ·, ·) colours in [0, 1]."""
        raise NotImplementedError


class Bins(Classes):
    """Each channel's values in so many equal bins, each channel classified by itself."""

    def __init__(self, bins: int, stride: int, mean: Tensor, std: Tensor, *, impl: str = "auto") -> None:
        super().__init__(len(mean), bins, stride, mean, std, impl)

    def classify(self, target: Tensor) -> Tensor:
        """Level v of 0 … 255 falls into bin ⌊(v + ½)·bins/256⌋, that of its middle, far from what rounding does."""
        levels = target * (LEVELS - 1) + 0.5
        return (levels * (self.classes / LEVELS)).floor().clamp(0, self.classes - 1).long()

    def colours(self, ids: Tensor) -> Tensor:
        """The middle of each bin."""
        return ((ids + 0.5) * (LEVELS / self.classes) - 0.5) / (LEVELS - 1)


class Clusters(Classes):
    """The nearest of so many colours (iGPT, Chen et al. 2020)."""

    centres: Tensor

    def __init__(self, colours: ColourClusters, stride: int, mean: Tensor, std: Tensor, *, impl: str = "auto") -> None:
        super().__init__(1, len(colours.centres), stride, mean, std, impl)
        self.digest = colours.digest
        self.register_buffer("centres", colours.centres, persistent=False)

    def classify(self, target: Tensor) -> Tensor:
        """By squares of differences: products would lose the digits in which near colours differ."""
        how = "donot_use_mm_for_euclid_dist"
        return torch.cdist(target.transpose(1, 2), self.centres, compute_mode=how).argmin(-1)[:, None]

    def colours(self, ids: Tensor) -> Tensor:
        """The centres."""
        return self.centres[ids[:, 0]].permute(0, 3, 1, 2)

    def identity(self) -> dict[str, Any]:
        """The colours, wherever their file is."""
        return {"objective.clusters": self.digest}


class Codes(Classes):
    """The codes that a tokenizer gives to the same image, in a size of one code for each predicted pixel."""

    def __init__(self, tokenizer: Tokenizer, stride: int, mean: Tensor, std: Tensor, *, impl: str = "auto") -> None:
        super().__init__(1, tokenizer.codes, stride, mean, std, impl)
        self.tokenizer = tokenizer

    def of(self, images: Tensor) -> Tensor:
        """(B, 1, H/s, W/s) int64."""
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        return self.tokenizer.codes_of(images * self.std + self.mean, grid)[:, None]

    def classify(self, target: Tensor) -> Tensor:
        """They are the classes."""
        return target

    def colours(self, ids: Tensor) -> Tensor:
        """What the tokenizer's decoder gives back, in its size."""
        return self.tokenizer.pixels(ids[:, 0])

    def identity(self) -> dict[str, Any]:
        """The tokenizer's weights, wherever their file is."""
        return {"objective.tokenizer": self.tokenizer.digest}

    def frozen_tensors(self) -> list[Tensor]:
        """The tokenizer's."""
        return self.tokenizer.tensors()
