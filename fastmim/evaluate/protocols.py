"""How published linear evaluations train their classifier: features, optimiser, rates, length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmim.models.features import Pooled

# From this width on a ViT gives its last block alone, class token and mean (DINO's and iBOT's ViT-B and -L).
_WIDE = 768


@dataclass(frozen=True)
class Protocol:
    """One of :data:`PROTOCOLS`.

    Attributes:
        inputs: what a classifier reads: "last4" (the last 4 blocks, or for a wide ViT the last one's class token and
            mean), "last" (the last block) or "each" (class token and mean of each block without the final norm, a
            classifier for each).
        optimizer: of :data:`fastmim.evaluate.directions.DIRECTIONS`.
        rates: learning rates per 256 images, a classifier for each.
        batch: images a step; all, where there are fewer.
        epochs: passes over the training images.
        warmup_epochs: linear from 0.
        by_epoch: the rate changes once an epoch, not each step.
        weight_decay: decoupled.
        batch_norm: features are normalised by the statistics of the batch first.
    """

    inputs: str
    optimizer: str = "sgd"
    rates: tuple[float, ...] = (1e-3,)
    batch: int = 1024
    epochs: int = 100
    warmup_epochs: int = 0
    by_epoch: bool = True
    weight_decay: float = 0.0
    batch_norm: bool = False

    def blocks(self, encoder: Any) -> tuple[int, bool]:
        """(last, normed) for ``encoder.features``."""
        count = len(encoder.all_blocks())
        if self.inputs == "each":
            return count, False
        wanted = 4 if self.inputs == "last4" and not _is_wide(encoder) else 1
        return min(wanted, count), True

    def features(self, encoder: Any, found: list[Pooled], pool: str) -> list[Tensor]:
        """Of what the encoder gave for :meth:`blocks`, (N, D) for each set of classifiers.

        Args:
            pool: "cls" or "mean": what stands for the image, where the protocol does not say.
        """
        if self.inputs == "each":
            return [one.cls if one.cls is one.mean else torch.cat(one, 1) for one in found]
        if self.inputs == "last4" and _is_wide(encoder):
            return [torch.cat(found[-1], 1)]
        return [torch.cat([one.cls if pool == "cls" else one.mean for one in found], 1)]


PROTOCOLS: Mapping[str, Protocol] = {
    "dino": Protocol("last4"),
    "ibot": Protocol("last4", rates=tuple(d * 10.0**p for p in range(-4, 1) for d in range(1, 10))),
    "mae": Protocol("last", "lars", (0.1,), 16384, 90, warmup_epochs=10, by_epoch=False, batch_norm=True),
    "moco": Protocol("last", rates=(3.0,), epochs=90),
    "beit": Protocol("each", "adamw", weight_decay=1e-4),
}
"""Caron et al. 2021 and Zhou et al. 2022 (of whose 45 rates the best counts), He et al. 2022, Chen et al. 2021, Bao et
al. 2022; as their public code has them."""


def _is_wide(encoder: Any) -> bool:
    return encoder.settings["name"] == "vit" and encoder.num_features >= _WIDE


def natural_pool(encoder: Any) -> str:
    """What stands for an image: the class token where pretraining uses it, else the mean.

    That is a ViT's with a bias on keys (DINO, iBOT, MAE, MoCo v3); SimMIM's and BEiT's, and Swin's, is the mean.
    """
    settings = encoder.settings
    return "cls" if settings["name"] == "vit" and settings["key_bias"] else "mean"
