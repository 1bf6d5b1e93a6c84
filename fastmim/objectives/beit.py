"""BEiT: predict which code a tokenizer gives to each hidden patch (Bao et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk

from ..models import encoder_settings
from ..models.layers import to_pair, trunc_normal_
from ..models.rules import encoder_stride
from .arguments import no_colours
from .base import Objective
from .block_masks import beit_mask, masked_rows
from .photometric import Photometric
from .pictures import Picture
from .token_cache import TokenCache, crop_digests
from .tokenizer import code_picture, open_tokenizer
from .views import Images, View

CODES = 8192
"""Of DALL·E's tokenizer, and the default of ours."""


class BEiT(Objective):
    """Encoder and a linear head that names the code of each hidden patch; a frozen tokenizer knows them.

    Args:
        tokenizer: its file, or the folder of the run (objective.name=dvae) that trained it; null: codes come with the
            images
        token_cache: folder that keeps the codes of crops, for crops that come again; null = none
        codes: size of the vocabulary, null = the tokenizer's
        num_mask: patches that a mask hides at most, null = 75 of 196
        min_block: least area of a block of a mask in patches, null = 16 of 75 hidden ones
        jitter: strength of brightness, contrast and saturation, alike for encoder and tokenizer; 0 = none
        common: of every :class:`Objective`
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        tokenizer: str | None = None,
        token_cache: str | None = None,
        codes: int | None = None,
        num_mask: int | None = None,
        min_block: int | None = None,
        jitter: float = 0.4,
        **common: Any,
    ) -> None:
        own: dict[str, Any] = dict(tokenizer=tokenizer, token_cache=token_cache)
        self.check(encoder=encoder, codes=codes, num_mask=num_mask, min_block=min_block, jitter=jitter, **own)
        self.check_pixels(**common, jitter=jitter, tokenizer=tokenizer)
        super().__init__(encoder=encoder, **common)
        self.jitter = jitter
        self.num_mask, self.min_block = mask_sizes(self.token_grid, num_mask, min_block)
        self.tokenizer = None if tokenizer is None else open_tokenizer(tokenizer, codes, self.in_chans)
        self._cache_folder = token_cache
        self._cache: TokenCache | None = None
        self.codes = self.tokenizer.codes if self.tokenizer is not None else codes or CODES
        self.head = nn.Linear(self.encoder.num_features, self.codes)
        trunc_normal_(self.head.weight, std=0.02, bound=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def check(
        cls,
        *,
        encoder: Mapping[str, Any],
        codes: int | None,
        num_mask: int | None,
        min_block: int | None,
        jitter: float,
        tokenizer: str | None,
        token_cache: str | None,
        **_: Any,
    ) -> None:
        """Masks leave some patches visible, and their blocks fit; see :meth:`Objective.check`."""
        settings = encoder_settings(encoder)
        stride = encoder_stride(settings)
        rows, columns = (-(-edge // stride) for edge in to_pair(settings["img_size"], "img_size"))
        num_mask, min_block = mask_sizes((rows, columns), num_mask, min_block)
        if min(rows, columns) < 2:
            raise ValueError(f"num_mask={num_mask}: blocks need two tokens in either direction, not {rows} × {columns}")
        if not 0 < num_mask < rows * columns:
            example = mask_sizes((rows, columns), None, None)[0]
            raise ValueError(f"num_mask={num_mask}: must lie in 1 … {rows * columns - 1}, for example {example}")
        if not 1 <= min_block <= num_mask:
            raise ValueError(f"min_block={min_block}: must lie in 1 … num_mask={num_mask}, or null")
        if token_cache is not None and tokenizer is None:
            raise ValueError(f"token_cache={token_cache}: keeps the codes of a tokenizer; give one, or null")
        if codes is not None and codes < 2:
            raise ValueError(f"codes={codes}: must be at least 2, or null for the tokenizer's")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter={jitter}: must lie in [0, 1]")
        if jitter and settings["in_chans"] not in (1, 3):
            raise ValueError(
                f"jitter={jitter}: changes colours of 1 or 3 channels, not of {settings['in_chans']}; use 0"
            )

    @classmethod
    def check_pixels(
        cls, *, pixels: str = "uint8", jitter: float = 0.0, tokenizer: str | None = None, **_: Any
    ) -> None:
        """A tokenizer reads values in [0, 1]; float images have no colours to change."""
        if pixels == "float32" and tokenizer is not None:
            fix = "use objective.name=simmim or mae"
            raise ValueError(f"tokenizer={tokenizer}: reads images in [0, 1], not data.pixels=float32; {fix}")
        no_colours("jitter", jitter, 0, pixels)

    def forward(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a micro-batch.

        Args:
            images: Two views of the same crops, (1, B, C, H, W) for the encoder and (1, B, C, h, w) for the tokenizer,
                uint8, or float normalised by mean and std. Or the first of them and its codes, (B, …) integers of as
                many as there are tokens. Or (B, C, H, W) alone: the tokenizer then gets it in its own size.
            mask: (B, rows, columns) of :attr:`token_grid`, 1 = masked. But on a CPU, no more than B·``num_mask`` count.

        Returns:
            ``loss``, the cross-entropy over all masked tokens of the micro-batch, float32, and ``accuracy``, the share
            of them whose code is the likeliest.
        """
        first, ids = self._targets(images)
        expected = (len(first), *self.token_grid)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        rows, weight = self._hidden(mask)
        some = rows if len(rows) else None
        tokens = self.encoder(self.normalise(first), self._patch_mask(mask), some)
        # The logits of all tokens would be the largest tensor of the step: R·codes·(2 + 4) bytes under autocast for
        # the R masked rows, 75 of 196, and as much again for their gradients.
        logits = self.head(tokens.flatten(0, 2)[rows]).float()
        target = ids.flatten()[rows]
        total = weight.sum().clamp(min=1)
        loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / total
        right = (logits.detach().argmax(1) == target) * weight
        return {"loss": loss, "accuracy": right.sum() / total}

    def _targets(self, images: Images) -> tuple[Tensor, Tensor]:
        """The (B, C, H, W) images of the encoder, and (B, tokens) codes."""
        second = None
        if not isinstance(images, Tensor):
            images, second = images
            images = images[0] if images.ndim == 5 else images
        if tuple(images.shape[1:]) != (self.in_chans, *self.img_size):
            shape = ", ".join(map(str, (self.in_chans, *self.img_size)))
            raise ValueError(f"images must have shape (B, {shape}), got {tuple(images.shape)}")
        ids = second if second is not None and second.dtype == torch.int64 else self.tokenise(images, second)
        if ids.numel() != len(images) * self.token_grid[0] * self.token_grid[1]:
            raise ValueError(f"codes must be one per token {(len(images), *self.token_grid)}, got {tuple(ids.shape)}")
        return images, ids.flatten(1)

    def tokenise(self, images: Tensor, view: Tensor | None = None) -> Tensor:
        """(B, rows, columns) int64 codes of (B, C, H, W) images, from their second ``view`` where there is one.

        Raises:
            ValueError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("objective.tokenizer=null: give the file of a tokenizer, or codes with the images")
        view = view[0] if view is not None and view.ndim == 5 else view
        return self.tokenizer.codes_of(self.zero_to_one(images if view is None else view), self.token_grid)

    def prepare(self, images: Images, sample_ids: Tensor, *, seed: int, epoch: int) -> Images:
        """See :meth:`Objective.prepare`; with ``token_cache`` the second view has become its codes."""
        images = super().prepare(images, sample_ids, seed=seed, epoch=epoch)
        if self._cache_folder is None or isinstance(images, Tensor):
            return images
        first, second = images
        return first, self._remembered(second[0])

    def _remembered(self, crops: Tensor) -> Tensor:
        """(B, tokens) codes of the tokenizer's uint8 crops; only those that were never seen are computed."""
        if self._cache is None:
            assert self._cache_folder is not None and self.tokenizer is not None
            tokens = self.token_grid[0] * self.token_grid[1]
            self._cache = TokenCache(self._cache_folder, self.tokenizer.digest, tokens)
        keys = crop_digests(crops)
        codes, unknown = self._cache.look_up(keys)
        if unknown:
            new = self.tokenise(crops[unknown], crops[unknown]).flatten(1).cpu()
            codes[unknown] = new
            self._cache.add([keys[i] for i in unknown], new)
        return codes.to(crops.device)

    @property
    def token_size(self) -> tuple[int, int]:
        """(H, W) of the tokenizer's images: as many codes as the encoder has tokens."""
        assert self.tokenizer is not None
        edge = self.tokenizer.patch_size
        return self.token_grid[0] * edge, self.token_grid[1] * edge

    def _hidden(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (R,) of masked tokens and their weights, 1; visible ones of weight 0 where R may not follow it."""
        if fk.shape_may_follow(mask):
            rows = mask.flatten().nonzero().squeeze(1)
            return rows, torch.ones(len(rows), device=mask.device)
        rows, weight = masked_rows(mask, len(mask) * self.num_mask)
        return rows, (weight > 0).float()

    def _patch_mask(self, mask: Tensor) -> Tensor:
        """(B, H/p, W/p): each hidden token over the patches that it is made of."""
        repeat = self.encoder.stride // self.encoder.patch_size
        wide = mask.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2) if repeat > 1 else mask
        return wide[:, : self.encoder.grid[0], : self.encoder.grid[1]]

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, rows, columns) bool of :attr:`token_grid`, keyed by (seed, epoch, sample id)."""
        how: dict[str, Any] = dict(count=self.num_mask, smallest=self.min_block, seed=seed, epoch=epoch)
        return beit_mask(sample_ids, grid=self.token_grid, **how)

    def views(self) -> tuple[View, ...]:
        """The crop of the data section for the encoder, and the same in the tokenizer's size, filtered by Lanczos."""
        strengths = (self.jitter, self.jitter, self.jitter, 0.0)
        how = Photometric(jitter=strengths, jitter_p=1.0, grey_p=0.0, blur_p=0.0) if self.jitter else None
        first = View(self.img_size, photometric=how)
        if self.tokenizer is None:
            return (first,)
        return first, View(self.token_size, interpolation="lanczos", same_crop=True, photometric=how)

    def example(self, batch: int) -> tuple[Images, Tensor]:
        """See :meth:`Objective.example`; without a tokenizer with codes."""
        images, mask = super().example(batch)
        if self.tokenizer is not None or not isinstance(images, Tensor):
            return images, mask
        count = self.token_grid[0] * self.token_grid[1]
        return (images, torch.arange(batch * count, device=mask.device).view(batch, count) % self.codes), mask

    def identity(self) -> dict[str, Any]:
        """The tokenizer's weights, wherever its file is; where its codes are kept changes nothing."""
        if self.tokenizer is None:
            raise ValueError("objective.tokenizer=null: give the encoder.safetensors of a run with objective.name=dvae")
        return {"objective.tokenizer": self.tokenizer.digest, "objective.token_cache": None}

    def frozen_tensors(self) -> list[Tensor]:
        """The tokenizer's."""
        return [] if self.tokenizer is None else self.tokenizer.tensors()

    def shares(self) -> dict[str, float]:
        """The embedding reads visible patches."""
        return {"mask_tokens": 1 - self.num_mask / (self.token_grid[0] * self.token_grid[1])}

    @torch.no_grad()
    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """See :func:`.tokenizer.code_picture`."""
        seen = self.zero_to_one(images).clamp(0, 1)
        ids = self.tokenise(images)
        guess = self.head(self.encoder(self.normalise(images), self._patch_mask(mask))).argmax(-1)
        assert self.tokenizer is not None
        return code_picture(self.tokenizer, seen, mask, ids, guess, mask.bool())


def mask_sizes(grid: tuple[int, int], num_mask: int | None, min_block: int | None) -> tuple[int, int]:
    """Both, in tokens of ``grid``; what is None in the shares that are 75 and 16 of 14 × 14."""
    count = max(round(75 / 196 * grid[0] * grid[1]), 1) if num_mask is None else num_mask
    return count, max(round(16 / 75 * count), 1) if min_block is None else min_block
