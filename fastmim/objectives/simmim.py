"""SimMIM: predict the raw or locally normalised pixels of masked patches with a linear head (Xie et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.local_norm.op import local_statistics
from fastmim_kernels.masked_loss.op import LOSSES
from fastmim_kernels.reference import pixel_shuffle

from ..models import create_encoder
from ..models.read_rows import masked_tokens
from .masking import masked_units, random_mask

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SimMIM(nn.Module):
    """Encoder, linear head and masked loss.

    Args:
        encoder: Keyword arguments of :func:`fastmim.models.create_encoder`.
        impl: Implementation of the ops: "auto", "triton", "torch" or "reference".
        mask_ratio: Share of mask units hidden by :meth:`random_mask`.
        unit: Edge of a mask unit in pixels, a multiple of the patch size.
        norm_target: Window of the normalised target in pixels (odd); 0 predicts raw normalised pixels.
        loss: "l1", "l2" or "smooth_l1".
        loss_on: "masked" pixels, or "all".
        mean, std: Channel statistics in [0, 1] units, for uint8 images and pictures; default ImageNet's for
            three channels, 0.5 otherwise.

    Raises:
        ValueError: A value is out of range or does not fit the encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        encoder: dict[str, Any],
        impl: str = "auto",
        mask_ratio: float = 0.6,
        unit: int = 32,
        norm_target: int = 0,
        loss: str = "l1",
        loss_on: str = "masked",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = create_encoder(encoder, impl=impl)
        self.impl, self.loss, self.loss_on = impl, loss, loss_on
        self.mask_ratio, self.unit, self.norm_target = mask_ratio, unit, norm_target
        self.img_size, self.in_chans = self.encoder.img_size, self.encoder.in_chans
        self.patch_size, self.stride = self.encoder.patch_size, self.encoder.stride
        self._check()
        self.head = nn.Linear(self.encoder.num_features, self.stride**2 * self.in_chans)
        self.register_buffer("mean", _channel_values("mean", mean, IMAGENET_MEAN, self.in_chans), persistent=False)
        self.register_buffer("std", _channel_values("std", std, IMAGENET_STD, self.in_chans), persistent=False)

    def _check(self) -> None:
        if self.unit < self.patch_size or self.unit % self.patch_size:
            raise ValueError(f"unit={self.unit}: must be a multiple of patch_size={self.patch_size}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}: must be one of {', '.join(LOSSES)}")
        if self.loss_on not in ("masked", "all"):
            raise ValueError(f"loss_on={self.loss_on!r}: must be 'masked' or 'all'")
        if self.norm_target and (self.norm_target < 3 or self.norm_target % 2 == 0):
            raise ValueError(f"norm_target={self.norm_target}: must be 0 (off) or odd and at least 3, for example 47")
        rows, cols = (-(-edge // self.unit) for edge in self.img_size)
        masked_units(self.mask_ratio, rows * cols)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: (B, C, H, W), float normalised by mean and std, or uint8.
            mask: (B, H/p, W/p) bool or 0/1, 1 = masked.

        Returns:
            ``{"loss": scalar float32}``.

        Raises:
            ValueError: Shapes differ from what the encoder was built for.
        """
        self._check_inputs(images, mask)
        images = self.normalise(images)
        target = fk.local_norm_target(images, self.norm_target, impl=self.impl) if self.norm_target else images
        rows = None
        if self.loss_on == "masked":
            rows = masked_tokens(mask, self.img_size, self._token_grid(), self.stride)
        tokens = self.encoder(images, mask, rows)
        scored = torch.ones_like(mask) if self.loss_on == "all" else mask
        loss = fk.linear_masked_l1(
            tokens,
            self.head.weight,
            self.head.bias,
            target,
            scored,
            stride=self.stride,
            loss=self.loss,
            impl=self.impl,
        )
        return {"loss": loss}

    def _token_grid(self) -> tuple[int, int]:
        return -(-self.img_size[0] // self.stride), -(-self.img_size[1] // self.stride)

    def set_micro_batch(self, index: int, count: int) -> None:
        """Say that the next forward pass is number ``index`` of ``count`` before the weights change.

        Optional: it saves the encoder from casting its weights for each of them.
        """
        self.encoder.set_micro_batch(index, count)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) prediction in the space of the target (normalised pixels, or locally normalised ones)."""
        self._check_inputs(images, mask)
        tokens = self.encoder(self.normalise(images), mask)
        prediction = pixel_shuffle(F.linear(tokens, self.head.weight, self.head.bias), self.stride)
        return prediction[:, :, : self.img_size[0], : self.img_size[1]].float()

    @torch.no_grad()
    def reconstruct_pixels(self, images: Tensor, mask: Tensor) -> Tensor:
        """:meth:`reconstruct` as a normalised image; the local normalisation is undone with the true statistics."""
        prediction = self.reconstruct(images, mask)
        if not self.norm_target:
            return prediction
        mean, std = local_statistics(self.normalise(images), self.norm_target)
        return prediction * std + mean

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, H/p, W/p) bool masks keyed by (seed, epoch, sample id), on the device of ``sample_ids``."""
        return random_mask(
            sample_ids,
            grid=self.encoder.grid,
            repeat=self.unit // self.patch_size,
            mask_ratio=self.mask_ratio,
            seed=seed,
            epoch=epoch,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 → float32 normalised by mean and std; float images pass unchanged."""
        if images.dtype != torch.uint8:
            return images
        return images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images → [0, 1]."""
        return (images * self.std + self.mean).clamp(0, 1)

    def _check_inputs(self, images: Tensor, mask: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(
                f"images must have shape (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(images.shape)}"
            )
        if tuple(mask.shape) != (images.shape[0], *self.encoder.grid):
            raise ValueError(f"mask must have shape {(images.shape[0], *self.encoder.grid)}, got {tuple(mask.shape)}")


def _channel_values(name: str, values: tuple[float, ...] | None, imagenet: tuple[float, ...], in_chans: int) -> Tensor:
    if values is None:
        values = imagenet if in_chans == 3 else (0.5,)
    if len(values) not in (1, in_chans):
        raise ValueError(f"{name}={tuple(values)}: must hold 1 value or one per channel ({in_chans})")
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std={tuple(values)}: must be positive")
    return torch.tensor(values, dtype=torch.float32, device="cpu").expand(in_chans).reshape(in_chans, 1, 1).clone()
