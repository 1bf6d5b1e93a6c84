"""An objective outside the package: the mean colour of an image from the mean of its tokens, half of them hidden."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmim.objectives import Objective
from fastmim.objectives.unit_masks import UnitMasks


class Toy(Objective):
    """Predict the mean colour of an image.

    Args:
        sharpness: power of the error;
            above 1, large errors count more
        depth: layers of the head
        common: of every objective
    """

    def __init__(self, *, sharpness: float = 1.0, depth: int, **common: Any) -> None:
        self.check(sharpness=sharpness)
        super().__init__(**common)
        self.sharpness = sharpness
        width = self.encoder.num_features
        self.head = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth - 1)), nn.Linear(width, self.in_chans))

    @classmethod
    def check(cls, *, sharpness: float, **_: Any) -> None:
        """The error has a gradient."""
        if sharpness <= 0:
            raise ValueError(f"sharpness={sharpness}: must be > 0; use 1 or 2")

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        images = self.normalise(images)
        predicted = self.head(self.encoder(images, mask).mean((1, 2))).float()
        error = (predicted - images.mean((2, 3))).abs()
        return {"loss": error.pow(self.sharpness).mean(), "bias": (predicted - images.mean((2, 3))).mean().detach()}

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        patch = self.encoder.patch_size
        masks = UnitMasks(self.img_size, patch, kind="random", mask_ratio=0.5, unit=patch)
        return masks(sample_ids, seed=seed, epoch=epoch)

    def shares(self) -> dict[str, float]:
        return {"mask_tokens": 0.5}


class NotAnObjective(torch.nn.Module):
    pass
