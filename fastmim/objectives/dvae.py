"""A tokenizer by reconstruction: a discrete autoencoder trained through a Gumbel-softmax (Ramesh et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..models import AUTOENCODERS, Autoencoder
from .base import Objective
from .keys import GUMBEL, crop_keys
from .noise import gumbel
from .pictures import Picture, to_rgb
from .schedule import Schedule

WINDOW = 100
"""Updates within which a code must have been an image's likeliest one to count as used."""


class DVAE(Objective):
    """Codes for squares of pixels, from which a decoder gives the pixels back; the model is a ``dvae`` or ``dalle``.

    Training mixes codes by softmax((logits + noise) / temperature); validation and pictures take the likeliest code.

    Args:
        temperature: of the softmax at the start
        temperature_end: at the end, half a cosine later; low ones train what the likeliest code alone gives
        kl_weight: weight of the divergence of the codes' distribution at a place from the uniform one, in nats
        balance_weight: the same of the mean distribution of a micro-batch; above 0 against codes that nothing uses
        common: of every :class:`Objective`
    """

    families: ClassVar[tuple[str, ...]] = AUTOENCODERS

    temperature: Tensor
    age: Tensor
    seen: Tensor

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        temperature: float = 0.9,
        temperature_end: float = 0.9,
        kl_weight: float = 0.0,
        balance_weight: float = 0.0,
        **common: Any,
    ) -> None:
        self.check(
            encoder=encoder,
            temperature=temperature,
            temperature_end=temperature_end,
            kl_weight=kl_weight,
            balance_weight=balance_weight,
        )
        self.check_pixels(**common)
        super().__init__(encoder=encoder, **common)
        self.kl_weight, self.balance_weight = kl_weight, balance_weight
        self._temperatures = (temperature, temperature_end)
        self.register_buffer("temperature", torch.tensor(temperature, device="cpu"), persistent=False)
        # Integers: DeepSpeed would round floating-point buffers.
        self.register_buffer("age", torch.full((self.codes,), WINDOW, device="cpu"))
        self.register_buffer("seen", torch.zeros(self.codes, dtype=torch.int64, device="cpu"), persistent=False)

    @classmethod
    def check(cls, **given: Any) -> None:
        """Temperatures are positive, weights not negative; see :meth:`Objective.check`."""
        for name in ("temperature", "temperature_end"):
            if not given[name] > 0:
                raise ValueError(f"{name}={given[name]}: must be > 0, for example 0.9")
        for name in ("kl_weight", "balance_weight"):
            if given[name] < 0:
                raise ValueError(f"{name}={given[name]}: must be at least 0")

    @classmethod
    def check_pixels(cls, *, pixels: str = "uint8", **_: Any) -> None:
        """It learns values in [0, 1]."""
        if pixels == "float32":
            raise ValueError("name=dvae: learns images in [0, 1], not data.pixels=float32; use simmim or mae")

    @property
    def autoencoder(self) -> Autoencoder:
        """The model."""
        model: Any = self.encoder
        return model

    @property
    def codes(self) -> int:
        """Size of the vocabulary."""
        return self.autoencoder.codes

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: (B, C, H, W), float normalised by mean and std, or uint8.
            mask: (B,) int64 keys of the noise, of :meth:`random_mask`.

        Returns:
            ``loss`` = ``mse``, in training and the weighted divergences, float32; ``mse`` of pixels in [0, 1];
            ``mean_colour``, the same of each image's mean colour, for comparison; ``codes_used``, the share of codes
            that were some place's likeliest in the last :data:`WINDOW` updates; ``perplexity`` of the likeliest codes
            of this batch.
        """
        target = self.zero_to_one(images)
        logits = self.autoencoder.logits(target).float()
        ids = logits.argmax(1)
        counts = torch.zeros_like(self.seen).scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
        if self.training:
            self.seen.add_(counts)
            weights = ((logits + gumbel(mask, logits.shape[1:])) / self.temperature).softmax(1)
        else:
            weights = self.autoencoder.one_hot(ids)
        mse = (self.autoencoder.decode(weights).float() - target).square().mean()
        loss = mse + self._divergences(logits) if self.training else mse
        share = counts / counts.sum()
        return {
            "loss": loss,
            "mse": mse.detach(),
            "mean_colour": (target - target.mean((2, 3), keepdim=True)).square().mean(),
            "codes_used": (self.age < WINDOW).float().mean(),
            "perplexity": torch.special.entr(share).sum().exp(),
        }

    def _divergences(self, logits: Tensor) -> Tensor:
        """Weighted, from the uniform distribution: log codes less the entropy."""
        log_q = logits.log_softmax(1)
        q, total = log_q.exp(), logits.new_zeros(())
        if self.kl_weight:
            total = total + self.kl_weight * (math.log(self.codes) + (q * log_q).sum(1).mean())
        if self.balance_weight:
            mean = q.mean((0, 2, 3)).clamp(min=1e-9)  # the entropy's slope is infinite at 0
            total = total + self.balance_weight * (math.log(self.codes) - torch.special.entr(mean).sum())
        return total

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B,) int64 keys of the noise, a function of (seed, epoch, sample id): nothing is hidden here."""
        return crop_keys(sample_ids, 1, seed=seed, epoch=epoch, crop=0, purpose=GUMBEL)[:, 0]

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """The temperature follows the step."""
        start, end = self._temperatures
        self.temperature.fill_(Schedule(name="cosine", base_lr=start, min_lr=end, total_steps=total)(step))

    @torch.no_grad()
    def after_step(self) -> None:
        """Which codes were used in this update, on any rank."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.seen)
        self.age.add_(1).masked_fill_(self.seen > 0, 0)
        self.seen.zero_()

    def skip_step(self) -> None:
        """Forget what was seen."""
        self.seen.zero_()

    @torch.no_grad()
    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """The image, what its likeliest codes give back, and the codes, each in a colour of its own."""
        target = self.zero_to_one(images)
        ids = self.autoencoder(target)
        columns = [target.clamp(0, 1), self.autoencoder.pixels(ids)]
        shown = [to_rgb(column.float()).cpu() for column in columns]
        return Picture(("image", "reconstruction", "codes"), [*shown, code_map(ids, self.autoencoder.patch_size)])


def code_map(ids: Tensor, edge: int) -> Tensor:
    """(B, h, w) codes → (B, 3, h·edge, w·edge) colours on the CPU, far apart for codes that are near."""
    steps = torch.tensor([0.754877666, 0.569840291, 0.362895], dtype=torch.float64)  # of the plastic number
    colours = (ids.cpu()[:, None] * steps[:, None, None]).frac().float()
    return colours.repeat_interleave(edge, 2).repeat_interleave(edge, 3)
