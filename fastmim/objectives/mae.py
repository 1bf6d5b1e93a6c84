"""MAE: encode the visible patches alone, and predict the pixels of the others with a small decoder (He et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from ..models import encoder_settings
from ..models.layers import to_pair
from ..models.positions import absolute_positions, check_positions
from ..models.read_rows import count_shown, hidden_tokens
from ..models.rules import check_heads, encoder_stride, patch_grid
from ..models.stream import Step, stream_dtype
from ..models.visible import VisibleColumns
from ..models.vit import NORM_EPS, Attention, VitBlock, run_blocks
from ..models.vit_init import xavier_linears
from .base import Objective
from .groups import split_by_rank
from .losses import pixel_loss
from .masks import kept_patches, pixel_mask, random_units, split_patches
from .pictures import Picture, reconstruction
from .pixel_heads import predict_pixels
from .targets import PATCH_EPS, normalised_target, patch_statistics
from .visible_decoder import check_whole, decoder_untrained


class MAE(Objective):
    """Encoder of the visible patches, decoder of all of them, squared error of the hidden ones.

    A patch is what a final token stands on: a ViT's own patches, and squares of its stride for a Swin, whose windows
    then hold visible tokens only (GreenMIM, Huang et al. 2022). To the decoder a Swin's class token is the mean of its
    visible tokens.

    Args:
        mask_ratio: share of the patches that are hidden; the count per image is rounded up
        norm_pix_loss: the target is each patch's pixels by their own mean and deviation
        decoder_embed_dim: width of the decoder
        decoder_depth: its blocks
        decoder_num_heads: attention heads of each
        common: of every :class:`Objective`
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        **common: Any,
    ) -> None:
        own: dict[str, Any] = dict(decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth)
        self.check(encoder=encoder, mask_ratio=mask_ratio, decoder_num_heads=decoder_num_heads, **own)
        super().__init__(encoder=encoder, **common)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.stride = self.encoder.stride
        self.patches = math.prod(self.token_grid)
        self.kept = kept_patches(mask_ratio, self.patches)
        self.visible = None if self.encoder.settings["name"] == "vit" else VisibleColumns(self.encoder)
        # The decoder, which fills the places of hidden patches, has the token for them.
        self.encoder.register_parameter("mask_token", None)
        self._make_decoder(decoder_embed_dim, decoder_depth, decoder_num_heads)

    def _make_decoder(self, dim: int, depth: int, num_heads: int) -> None:
        """On the official names."""
        settings = self.encoder.settings
        how: dict[str, Any] = dict(qkv_bias=settings["qkv_bias"], key_bias=settings.get("key_bias", True), grid=None)
        self.decoder_embed = nn.Linear(self.encoder.num_features, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed = absolute_positions("sincos", self.token_grid, dim)
        self.decoder_blocks = nn.ModuleList(
            VitBlock(dim, Attention(dim, num_heads, **how), settings["mlp_ratio"], None) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(dim, self.in_chans * self.stride**2)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            xavier_linears(part)
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def check(
        cls,
        *,
        encoder: Mapping[str, Any],
        mask_ratio: float,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        **_: Any,
    ) -> None:
        """Patches that know where they are, some of them hidden, and a possible decoder."""
        settings = encoder_settings(encoder)
        stride = encoder_stride(settings)
        if settings["name"] == "vit":
            _check_vit(settings)
        else:
            check_whole(settings["img_size"], stride, f"MAE needs a multiple of the encoder's stride {stride}")
        rows, columns = patch_grid(to_pair(settings["img_size"], "img_size"), stride)
        kept_patches(mask_ratio, rows * columns)
        for key, value in (("decoder_embed_dim", decoder_embed_dim), ("decoder_depth", decoder_depth)):
            if value < 1:
                raise ValueError(f"{key}={value}: must be at least 1")
        try:
            check_positions("sincos", decoder_embed_dim)
            check_heads(decoder_num_heads, decoder_embed_dim)
        except ValueError as error:
            raise ValueError(f"decoder_{error}") from None

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch: the mean over hidden patches of the mean squared error of their pixels.

        Args:
            images: (B, C, H, W), float normalised by mean and std, or uint8. With ``has_gaps`` NaN is no data: the
                encoder sees the mean there, and the loss is the mean over the other pixels, see :func:`.pixel_loss`.
            mask: (B, H/p, W/p) of the encoder's own patches, bool or 0/1, 1 = hidden; whole tokens, as many in every
                image as :meth:`random_mask` hides.

        Returns:
            ``{"loss": scalar float32}``.

        Raises:
            ValueError: Shapes differ from what the encoder was built for; on a CPU also another number of patches.
        """
        keep, hidden, places = self._split(images, mask, self.kept)
        tokens = self.decode(self._encode(images, keep), places, hidden)[:, None, None]
        target = patch_pixels(images, hidden, self.stride).flatten(0, 1)
        everywhere = torch.ones(len(target), 1, 1, dtype=torch.bool, device=images.device)
        if self.has_gaps:
            target = normalised_target(
                self.true_pixels(target), 0, self.stride if self.norm_pix_loss else 0, has_gaps=True
            )
            error = pixel_loss("l2", has_gaps=True)
            return {"loss": error(tokens, self.decoder_pred, target, everywhere, stride=self.stride, impl=self.impl)}
        statistics = (self.mean, self.std) if images.dtype == torch.uint8 else (None, None)
        loss = fk.linear_masked_l1(
            tokens,
            self.decoder_pred.weight,
            self.decoder_pred.bias,
            target,
            everywhere,
            stride=self.stride,
            loss="l2",
            mean=statistics[0],
            std=statistics[1],
            target_eps=PATCH_EPS if self.norm_pix_loss else 0.0,
            count_eps=0.0,
            impl=self.impl,
        )
        return {"loss": loss}

    def _split(self, images: Tensor, mask: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`~fastmim.objectives.masks.split_patches`."""
        self.check_inputs(images, mask)
        return split_patches(hidden_tokens(mask, self.token_grid, kept), kept)

    def _encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """(B, 1 + K, D): the class token, then the visible ones."""
        encoder: Any = self.encoder
        if self.visible is None:
            pixels = self.normalise(patch_pixels(images, keep, self.stride))
            latent: Tensor = encoder.forward_kept(pixels.flatten(2), keep)
            return latent
        tokens = encoder(self.normalise(images), visible=self.visible(keep))
        return torch.cat((tokens.mean(1, keepdim=True), tokens), 1)

    def decode(self, latent: Tensor, places: Tensor, wanted: Tensor | None = None) -> Tensor:
        """The decoder's normed tokens.

        Args:
            latent: (B, 1 + K, D) of the encoder.
            places: (B, L) of :func:`~fastmim.objectives.masks.split_patches`.
            wanted: (B, M) numbers of the patches that are read; the last block makes no others.

        Returns:
            (B·M, decoder_embed_dim) of the wanted patches, or (B, 1 + L, decoder_embed_dim).
        """
        x = fk.linear(latent, self.decoder_embed.weight, self.decoder_embed.bias, impl=self.impl)
        dtype = stream_dtype(x, self.encoder.residual_dtype)
        assert self.decoder_pos_embed is not None
        x = fk.unshuffle(x, places, self.mask_token, self.decoder_pos_embed, out_dtype=dtype, impl=self.impl)
        rows = None
        if wanted is not None:
            first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1] + 1
            rows = (wanted + first).flatten()
        drops = [(None, None)] * len(self.decoder_blocks)
        return run_blocks(x, self.decoder_blocks, self.decoder_norm, drops, Step(self.impl), rows=rows)[1]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) prediction of every patch, in the space of the target (pixels, or a patch's normalised ones).

        The mask may hide another number of patches than in training, and of each image another one.
        """
        self.check_inputs(images, mask)
        tokens = torch.cat([self._all_tokens(*one) for one in zip(images.split(1), mask.split(1), strict=True)])
        return predict_pixels(tokens.unflatten(1, self.token_grid), self.decoder_pred, self.stride, self.img_size)

    def _all_tokens(self, image: Tensor, mask: Tensor) -> Tensor:
        """(1, L, decoder_embed_dim) of one image."""
        keep, _, places = self._split(image, mask, count_shown(mask, self.token_grid))
        return self.decode(self._encode(image, keep), places)[:, 1:]

    @torch.no_grad()
    def reconstruct_pixels(self, images: Tensor, mask: Tensor) -> Tensor:
        """:meth:`reconstruct` as a normalised image; a patch's normalisation is undone with its true statistics."""
        prediction = self.reconstruct(images, mask)
        if not self.norm_pix_loss:
            return prediction
        mean, std = patch_statistics(self.true_pixels(images), self.stride, self.has_gaps)
        return prediction * std + mean

    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """See :func:`~fastmim.objectives.pictures.reconstruction`."""
        guess = self.shown(images, self.reconstruct_pixels(images, mask))
        return reconstruction(self.shown(images), guess, mask)

    def untrained(self) -> str | None:
        """The decoder, after an encoder alone was loaded."""
        return decoder_untrained(self.decoder_norm)

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, H/p, W/p) bool masks keyed by (seed, epoch, sample id), on the device of ``sample_ids``."""
        mask = random_units(sample_ids, self.patches, self.patches - self.kept, seed, epoch)
        return pixel_mask(mask.unflatten(1, self.token_grid), self.encoder.grid)[:, 0]

    def groups(self, weight_decay: float, policy: str) -> list[dict[str, Any]]:
        """With "parity" every matrix decays, class and mask token too, as in the reference."""
        return split_by_rank(self, weight_decay) if policy == "parity" else super().groups(weight_decay, policy)


def _check_vit(settings: Mapping[str, Any]) -> None:
    for key in ("shared_rel_pos_bias", "rel_pos_bias"):
        if settings[key]:
            raise ValueError(f"{key}=true: not with MAE, whose patches are never all there; use abs_pos_embed")
    if not settings["abs_pos_embed"]:
        raise ValueError("abs_pos_embed=false: the ViT would not know where a patch is; use abs_pos_embed=sincos")


def patch_pixels(images: Tensor, numbers: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) images and (B, K) numbers of patches, row by row → (B, K, C, p, p)."""
    b, c, height, width = images.shape
    p, columns = patch_size, width // patch_size
    cut = images.reshape(b, c, height // p, p, columns, p).permute(0, 2, 4, 1, 3, 5)
    sample = torch.arange(b, device=images.device)[:, None]
    return cut[sample, numbers.div(columns, rounding_mode="floor"), numbers % columns]
