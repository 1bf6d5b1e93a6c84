"""SimMIM: predict the raw or locally normalised pixels of masked patches with a linear head (Xie et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..models import encoder_settings
from ..models.layers import to_pair
from ..models.read_rows import masked_tokens, shown_tokens
from ..models.visible import VisibleColumns
from .base import Objective, one_of
from .heads import pixel_head, predict_pixels
from .losses import PIXEL_LOSSES, PixelLossName
from .masks import check_unit, masked_units, random_mask, unit_count
from .pictures import Picture, reconstruction
from .targets import check_window, pixel_target, undo_target
from .visible_decoder import VisibleDecoder, check_decoder, check_visible, decoder_untrained

Scored = Literal["masked", "all"]


class SimMIM(Objective):
    """Encoder, linear head and masked loss: what is hidden from the encoder is predicted pixel by pixel.

    With ``visible_only`` a Swin encodes visible tokens only, as GreenMIM does (Huang et al. 2022), and a light decoder
    stands before the head, because nothing else knows of the hidden places.

    Args:
        mask_ratio: share of mask units hidden; the count per image is rounded up
        unit: edge of a mask unit in pixels, a multiple of patch_size
        norm_target: window of the locally normalised target in pixels (odd; 47), 0 = off
        loss: error per pixel
        loss_on: pixels that count
        visible_only: encode visible tokens only (swin, swinv2), in about the share of time and memory that is visible
        decoder_dim: visible_only: channels of the decoder, a multiple of 4
        decoder_depth: visible_only: blocks of the decoder
        decoder_num_heads: visible_only: heads of each
        common: of every :class:`Objective`
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        mask_ratio: float = 0.6,
        unit: int = 32,
        norm_target: int = 0,
        loss: PixelLossName = "l1",
        loss_on: Scored = "masked",
        visible_only: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        decoder_num_heads: int = 16,
        **common: Any,
    ) -> None:
        own: dict[str, Any] = dict(mask_ratio=mask_ratio, unit=unit, norm_target=norm_target)
        decoder = dict(decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads)
        self.check(encoder=encoder, loss=loss, loss_on=loss_on, visible_only=visible_only, **decoder, **own)
        super().__init__(encoder=encoder, **common)
        self.mask_ratio, self.unit, self.norm_target = mask_ratio, unit, norm_target
        self.loss, self.loss_on = loss, loss_on
        self.patch_size, self.stride = self.encoder.patch_size, self.encoder.stride
        self.visible = self.decoder = None
        if visible_only:
            self.encoder.register_parameter("mask_token", None)
            self.visible = VisibleColumns(self.encoder)
            units = unit_count(self.img_size, unit)
            self.shown = (units - masked_units(mask_ratio, units)) * (unit // self.stride) ** 2
            how = dict(dim=decoder_dim, depth=decoder_depth, num_heads=decoder_num_heads)
            self.decoder = VisibleDecoder(self.encoder.num_features, self.token_grid, **how, impl=self.impl)
        self.head = pixel_head(self.encoder, decoder_dim if visible_only else None)

    @classmethod
    def check(
        cls,
        *,
        encoder: Mapping[str, Any],
        mask_ratio: float,
        unit: int,
        norm_target: int,
        loss: str,
        loss_on: str,
        visible_only: bool,
        decoder_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        **_: Any,
    ) -> None:
        """The mask fits the encoder's patches and leaves some visible; see :meth:`Objective.check`."""
        settings = encoder_settings(encoder)
        check_unit(unit, settings["patch_size"])
        masked_units(mask_ratio, unit_count(to_pair(settings["img_size"], "img_size"), unit))
        check_window(norm_target)
        one_of("loss", loss, PIXEL_LOSSES)
        one_of("loss_on", loss_on, get_args(Scored))
        if visible_only:
            check_visible(settings, unit)
            check_decoder(decoder_dim, decoder_depth, decoder_num_heads)

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
        self.check_inputs(images, mask)
        images = self.normalise(images)
        target = pixel_target(images, self.norm_target, impl=self.impl)
        tokens = self._tokens(images, mask, only_masked=self.loss_on == "masked")
        scored = self._scored(mask)
        loss = PIXEL_LOSSES[self.loss](tokens, self.head, target, scored, stride=self.stride, impl=self.impl)
        return {"loss": loss}

    def _tokens(self, images: Tensor, mask: Tensor, *, only_masked: bool = False) -> Tensor:
        """(B, h, w, D) for the head; with ``only_masked`` it reads no others."""
        if self.visible is not None and self.decoder is not None:
            keep = shown_tokens(mask, self.token_grid, self.shown)
            return self.decoder(self.encoder(images, visible=self.visible(keep)), keep)
        rows = masked_tokens(mask, self.img_size, self.token_grid, self.stride) if only_masked else None
        return self.encoder(images, mask, rows)

    def _scored(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask) if self.loss_on == "all" else mask

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) prediction in the space of the target (normalised pixels, or locally normalised ones)."""
        self.check_inputs(images, mask)
        return predict_pixels(self._tokens(self.normalise(images), mask), self.head, self.stride, self.img_size)

    @torch.no_grad()
    def reconstruct_pixels(self, images: Tensor, mask: Tensor) -> Tensor:
        """:meth:`reconstruct` as a normalised image; the local normalisation is undone with the true statistics."""
        return undo_target(self.reconstruct(images, mask), self.normalise(images), self.norm_target)

    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """See :func:`~fastmim.objectives.pictures.reconstruction`."""
        guess = self.denormalise(self.reconstruct_pixels(images, mask).float())
        return reconstruction(self.denormalise(self.normalise(images)), guess, mask, self._scored(mask))

    def untrained(self) -> str | None:
        """The decoder, if it has one."""
        return None if self.decoder is None else decoder_untrained(self.decoder.norm)

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, H/p, W/p) bool masks keyed by (seed, epoch, sample id), on the device of ``sample_ids``."""
        repeat, ratio = self.unit // self.patch_size, self.mask_ratio
        return random_mask(sample_ids, grid=self.encoder.grid, repeat=repeat, mask_ratio=ratio, seed=seed, epoch=epoch)

    def shares(self) -> dict[str, float]:
        """The embedding reads visible patches; tokens without a pixel that is scored are not projected."""
        units = unit_count(self.img_size, self.unit)
        projected = masked_units(self.mask_ratio, units) / units if self.loss_on == "masked" else 1.0
        return {"mask_tokens": 1 - self.mask_ratio, "linear_masked_l1": projected}
