"""SimMIM: predict what masked patches hold, raw or normalised pixels with a linear head at first (Xie et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import encoder_settings
from ..models.layers import to_pair
from ..models.read_rows import count_shown, masked_tokens, shown_tokens
from ..models.rules import encoder_stride
from ..models.visible import VisibleColumns
from .arguments import one_of
from .base import Objective
from .class_targets import Codes
from .losses import PixelLossName
from .make_target import TargetName, check_target, make_target
from .masks import coarse_mask, pixel_mask
from .pictures import Picture, reconstruction
from .pixel_heads import HeadName, check_head, make_head, predict_pixels
from .tokenizer import code_picture
from .unit_masks import MaskKind, UnitMasks
from .visible_decoder import VisibleDecoder, check_decoder, check_visible, decoder_untrained

Scored = Literal["masked", "all"]


class SimMIM(Objective):
    """Encoder, light head and masked loss: what is hidden from the encoder is predicted pixel by pixel.

    With ``visible_only`` a Swin encodes visible tokens only, as GreenMIM does (Huang et al. 2022), and a light decoder
    stands before the head, because nothing else knows of the hidden places.

    Args:
        mask: which mask units are hidden: random ones, the blocks of BEiT until the count is full, or one square at a
            random place
        mask_ratio: share of mask units hidden; the count per image is rounded up; of a square that of its units
        unit: edge of a mask unit in pixels, a multiple of patch_size
        head: what predicts from the encoder's tokens; swin_tiny and swin_base are such a Swin backwards
        target: what is predicted: pixels, or classes: bins of each channel, clusters of colours, a tokenizer's codes
        target_stride: edge of the square of pixels whose mean is one prediction; null = 1, of tokens 16 or the stride
        norm_target: window of the locally normalised target in pixels (odd; 47), 0 = off
        norm_patch: the target is each token's pixels by their own mean and deviation
        loss: error per pixel; classes have the cross-entropy
        beta: smooth_l1: the error from which it is linear
        loss_on: pixels that count
        bins: equal bins of the values of each channel, 2 to 256
        clusters: file of colours that fastmim data clusters has made
        tokenizer: file of a tokenizer, or the folder of the run (objective.name=dvae) that trained it
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
        mask: MaskKind = "random",
        mask_ratio: float = 0.6,
        unit: int = 32,
        head: HeadName = "linear",
        target: TargetName = "pixels",
        target_stride: int | None = None,
        norm_target: int = 0,
        norm_patch: bool = False,
        loss: PixelLossName = "l1",
        beta: float = 1.0,
        loss_on: Scored = "masked",
        bins: int = 8,
        clusters: str | None = None,
        tokenizer: str | None = None,
        visible_only: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        decoder_num_heads: int = 16,
        **common: Any,
    ) -> None:
        own: dict[str, Any] = dict(mask=mask, mask_ratio=mask_ratio, unit=unit, loss_on=loss_on, head=head)
        what: dict[str, Any] = dict(target=target, target_stride=target_stride, norm_target=norm_target)
        what |= dict(norm_patch=norm_patch, loss=loss, beta=beta, bins=bins, clusters=clusters, tokenizer=tokenizer)
        decoder: dict[str, Any] = dict(decoder_dim=decoder_dim, decoder_depth=decoder_depth)
        decoder |= dict(decoder_num_heads=decoder_num_heads, visible_only=visible_only)
        self.check(encoder=encoder, **decoder, **own, **what)
        self.check_pixels(**common, **what)
        super().__init__(encoder=encoder, **common)
        self.masks = UnitMasks(self.img_size, self.encoder.patch_size, kind=mask, mask_ratio=mask_ratio, unit=unit)
        self.loss_on = loss_on
        self.patch_size, self.stride = self.encoder.patch_size, self.encoder.stride
        self.visible = self.decoder = None
        if visible_only:
            self.encoder.register_parameter("mask_token", None)
            self.visible = VisibleColumns(self.encoder)
            self.kept = self.masks.shown * (unit // self.stride) ** 2
            how = dict(dim=decoder_dim, depth=decoder_depth, num_heads=decoder_num_heads)
            self.decoder = VisibleDecoder(self.encoder.num_features, self.token_grid, **how, impl=self.impl)
        what |= dict(mean=self.mean, std=self.std, has_gaps=self.has_gaps, impl=self.impl)
        self.target = make_target(encoder_stride=self.stride, **what)
        dim = decoder_dim if visible_only else self.encoder.num_features
        sizes = dict(values=self.target.values, stride=self.stride, target_stride=self.target.stride)
        self.head = make_head(head, self.encoder.settings, dim, self.token_grid, **sizes, impl=self.impl)

    @classmethod
    def check(
        cls,
        *,
        encoder: Mapping[str, Any],
        mask: str,
        mask_ratio: float,
        unit: int,
        head: str,
        loss_on: str,
        visible_only: bool,
        decoder_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        **target: Any,
    ) -> None:
        """The mask fits the encoder's patches and leaves some visible; head and target fit the encoder and each other.

        See :meth:`Objective.check`.
        """
        settings = encoder_settings(encoder)
        size = to_pair(settings["img_size"], "img_size")
        UnitMasks(size, settings["patch_size"], kind=mask, mask_ratio=mask_ratio, unit=unit)
        one_of("loss_on", loss_on, get_args(Scored))
        stride = encoder_stride(settings)
        edge = check_target(size, stride, **target)
        check_head(head, stride, edge)
        if visible_only:
            check_visible(settings, unit)
            check_decoder(decoder_dim, decoder_depth, decoder_num_heads)

    @classmethod
    def check_pixels(
        cls, *, pixels: str = "uint8", has_gaps: bool = False, target: str = "pixels", **given: Any
    ) -> None:
        """Classes are of values in [0, 1]; a predicted pixel is one pixel, where some may be missing."""
        if pixels == "float32" and target != "pixels":
            raise ValueError(f"target={target}: of values in [0, 1], not of data.pixels=float32; use target=pixels")
        if has_gaps and given.get("target_stride") not in (None, 1):
            stride = given["target_stride"]
            raise ValueError(f"target_stride={stride}: not where pixels may be missing (data.no_data); use 1")

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: (B, C, H, W), float normalised by mean and std, or uint8. With ``has_gaps`` NaN is no data: the
                encoder sees the mean there, and the loss is that of the other pixels, see :func:`.pixel_loss`.
            mask: (B, H/p, W/p) bool or 0/1, 1 = masked.

        Returns:
            ``{"loss": scalar float32}``.

        Raises:
            ValueError: Shapes differ from what the encoder was built for.
        """
        self.check_inputs(images, mask)
        true = self.true_pixels(images)
        target, images = self.target.of(true), self.normalise(true)
        only_masked = self.loss_on == "masked" and not self.head.mixes
        tokens = self.head.tokens(self._tokens(images, mask, only_masked=only_masked))
        return {"loss": self.target.loss(tokens, self.head, target, self._scored(mask))}

    def _tokens(self, images: Tensor, mask: Tensor, *, only_masked: bool = False, shown: int | None = None) -> Tensor:
        """(B, h, w, D) for the head; with ``only_masked`` it reads no others; ``shown``: if not as in training."""
        if self.visible is not None and self.decoder is not None:
            keep = shown_tokens(mask, self.token_grid, self.kept if shown is None else shown)
            return self.decoder(self.encoder(images, visible=self.visible(keep)), keep)
        rows = masked_tokens(mask, self.img_size, self.token_grid, self.stride) if only_masked else None
        return self.encoder(images, mask, rows)

    def _scored(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask) if self.loss_on == "all" else mask

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) prediction in the space of the target: normalised pixels, or locally normalised ones.

        Of classes the colours of the likeliest ones. The mask may hide another share than in training, and of each
        image another one.

        Raises:
            ValueError: Shapes differ, or the target is codes of a tokenizer without a decoder.
        """
        found = [self.target.read(one) for one in self._predictions(self.normalise(images), mask)]
        pixels = torch.cat(found)
        return pixels if pixels.shape[2:] == images.shape[2:] else F.interpolate(pixels, self.img_size, mode="nearest")

    def _predictions(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """The head's (1, values, H/s, W/s) of each image."""
        self.check_inputs(images, mask)
        return [self._prediction(*one) for one in zip(images.split(1), mask.split(1), strict=True)]

    def _prediction(self, image: Tensor, mask: Tensor) -> Tensor:
        size = (self.img_size[0] // self.target.stride, self.img_size[1] // self.target.stride)
        shown = None if self.visible is None else count_shown(mask, self.token_grid)
        tokens = self.head.tokens(self._tokens(image, mask, shown=shown))
        return predict_pixels(tokens, self.head, self.head.stride, size)

    @torch.no_grad()
    def reconstruct_pixels(self, images: Tensor, mask: Tensor) -> Tensor:
        """:meth:`reconstruct` as a normalised image; a normalisation of the target is undone with true statistics."""
        return self.target.undo(self.reconstruct(images, mask), self.true_pixels(images))

    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """See :func:`~fastmim.objectives.pictures.reconstruction`, or of tokens :func:`.tokenizer.code_picture`."""
        if isinstance(self.target, Codes):
            return self._code_picture(self.target, images, mask)
        guess = self.shown(images, self.reconstruct_pixels(images, mask))
        return reconstruction(self.shown(images), guess, mask, self._scored(mask))

    def untrained(self) -> str | None:
        """The decoder, if it has one."""
        return None if self.decoder is None else decoder_untrained(self.decoder.norm)

    @torch.no_grad()
    def _code_picture(self, target: Codes, images: Tensor, mask: Tensor) -> Picture:
        images = self.normalise(images)
        guess = torch.cat([target.likeliest(one) for one in self._predictions(images, mask)])[:, 0]
        hidden = pixel_mask(coarse_mask(mask, self.img_size, target.stride), (guess.shape[1], guess.shape[2]))[:, 0]
        ids = target.of(images)[:, 0]
        return code_picture(target.tokenizer, self.denormalise(images), mask, ids, guess, hidden)

    def identity(self) -> dict[str, Any]:
        """Of the target."""
        return self.target.identity()

    def frozen_tensors(self) -> list[Tensor]:
        """Of the target."""
        return self.target.frozen_tensors()

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, H/p, W/p) bool masks keyed by (seed, epoch, sample id), on the device of ``sample_ids``."""
        return self.masks(sample_ids, seed=seed, epoch=epoch)

    def unit_masks(self) -> UnitMasks:
        """See :meth:`Objective.unit_masks`."""
        return self.masks

    def shares(self) -> dict[str, float]:
        """The embedding reads visible patches; tokens without a pixel that is scored are not projected."""
        hidden, touched = self.masks.shares(self.token_grid, self.stride)
        return {"mask_tokens": 1 - hidden, "linear_masked_l1": touched if self.loss_on == "masked" else 1.0}
