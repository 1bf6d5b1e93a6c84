"""Colour jitter, greyscale, blur and solarisation on the training device, keyed by (seed, epoch, sample id, crop).

One definition for every loader and device: loaders hand on uint8 crops, and what happens to their colours is a pure
function of the keys. Operations and their order are those of iBOT's and DINO's crops (Zhou et al. 2022, appendix;
Caron et al. 2021): brightness, contrast, saturation and hue in random order, grey, blur, solarisation.
What is drawn is here, what is done to pixels in ``pixel_ops.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .keys import PHOTOMETRIC, crop_keys, unit_floats
from .pixel_ops import BLENDS_BEFORE_HUE, Steps, Work, box_weights, run

_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Photometric:
    """What is done to the colours of a crop; the defaults are those of iBOT's local crops.

    Args:
        jitter: Strengths of brightness, contrast, saturation and hue: factors are uniform in
            [max(0, 1 - x), 1 + x], the turn of the hue in [-x, x] of a full circle, as in torchvision's ColorJitter.
        jitter_p, grey_p, blur_p, solarize_p: Probability of each; the four jitters come together.
        blur_sigma: Range of the blur's standard deviation in pixels.
        solarize_threshold: Values from here on are inverted, 0 ... 256.

    Raises:
        ValueError: A value is out of range.
    """

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: int = 128

    def __post_init__(self) -> None:
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            names = ", ".join(_OPERATIONS)
            raise ValueError(f"jitter={tuple(self.jitter)}: give {names}, none negative, hue at most 0.5")
        for name in ("jitter_p", "grey_p", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1]")
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma={tuple(self.blur_sigma)}: must satisfy 0 <= low <= high")
        if not 0 <= self.solarize_threshold <= 256:
            raise ValueError(f"solarize_threshold={self.solarize_threshold}: must lie in 0 ... 256")


class Draws(NamedTuple):
    """What was drawn for each row of a batch."""

    factors: Tensor  # (B, 4) float32 of brightness, contrast, saturation, hue; 1, 1, 1, 0: not jittered
    rank: Tensor  # (B, 4) int64: when each of these four is done, 0 first
    grey: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float32 pixels, 0: not blurred
    threshold: Tensor  # (B,) int16, 256: not solarised


def photometric(
    images: Tensor,
    sample_ids: Tensor,
    *,
    seed: int,
    epoch: int,
    crop: int | Tensor,
    how: Photometric,
) -> Tensor:
    """The augmented images; a row depends on its own pixels and keys alone.

    Args:
        images: (B, C, H, W) uint8, 3 channels, or 1: what turns colours then changes nothing, as in torchvision.
        sample_ids: (B,) integer, on the device of the images.
        seed, epoch: Keys.
        crop: Number of the crop among those of its sample, or (B,) integer for rows of several crops.
        how: Strengths and probabilities.

    Returns:
        (B, C, H, W) uint8, rounded once at the end; see :func:`apply_draws` for how far PIL's pixels are.

    Raises:
        ValueError: Images of another dtype or shape, keys that are no integers.
    """
    _check_images(images, sample_ids)
    return apply_draws(images, draw(sample_ids, seed=seed, epoch=epoch, crop=crop, how=how), how)


def draw(sample_ids: Tensor, *, seed: int, epoch: int, crop: int | Tensor, how: Photometric) -> Draws:
    """What :func:`photometric` does to each row, on the device of ``sample_ids``: same arguments, same bits anywhere.

    Which hash serves which draw is fixed, so that other strengths or probabilities leave the other draws alone.
    """
    keys = crop_keys(sample_ids, 13, seed=seed, epoch=epoch, crop=crop, purpose=PHOTOMETRIC)
    u = unit_floats(keys)
    jittered = u[:, 0] < how.jitter_p
    columns = []
    for index, strength in enumerate(how.jitter):
        low, high = (-strength, strength) if index == 3 else (max(0.0, 1 - strength), 1 + strength)
        neutral = 0.0 if index == 3 else 1.0
        columns.append(torch.where(jittered, low + (high - low) * u[:, 1 + index], neutral))
    low, high = how.blur_sigma
    return Draws(
        factors=torch.stack(columns, 1),
        rank=keys[:, 5:9].argsort(dim=1, stable=True).argsort(dim=1),
        grey=u[:, 9] < how.grey_p,
        sigma=torch.where(u[:, 10] < how.blur_p, low + (high - low) * u[:, 11], 0.0),
        threshold=torch.where(u[:, 12] < how.solarize_p, how.solarize_threshold, 256).short(),
    )


def apply_draws(images: Tensor, draws: Draws, how: Photometric) -> Tensor:
    """uint8 (B, C, H, W) → the same shape and dtype, by what was drawn for each row.

    Pixels are float32 between the operations, clamped where PIL clamps them, and rounded once: within .53 of a level
    (of 255) of torchvision's float arithmetic after each jitter, within .65 after all four and grey. PIL cuts off
    after brightness, contrast and saturation (2 levels apart at most, half of one darker on average), turns hues in
    HSV of 8 bits (15; 2 on average) and rounds in each of the six passes of its blur (3); grey differs by 1 at most,
    solarisation not. A chain of all is a level brighter than PIL's on average; single pixels are up to 24 apart.

    Args:
        images: Of which ``draws`` has a row each.
        draws: Of :func:`draw`.
        how: What ``draws`` was drawn from: what it never does is not computed.
    """
    if images.shape[1] == 1:
        draws, how = _of_grey(draws), replace(how, jitter=(*how.jitter[:2], 0.0, 0.0), grey_p=0.0)
    scale, luma, mean = _blends(draws)
    work = Work(
        scale,
        luma,
        mean,
        turn=draws.factors[:, 3:],
        blur=box_weights(draws.sigma, how.blur_sigma[1]),
        threshold=draws.threshold[:, None],
    )
    return run(images, work, _possible(how, work.blur.shape[1]))


def _of_grey(draws: Draws) -> Draws:
    """Without what a grey image does not notice."""
    brightness, contrast, *_ = draws.factors.unbind(1)
    one = torch.ones_like(brightness)
    factors = torch.stack((brightness, contrast, one, torch.zeros_like(one)), 1)
    return draws._replace(factors=factors, grey=torch.zeros_like(draws.grey))


def _blends(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, luma, mean) of :class:`Work`: brightness, contrast, saturation and grey in a fixed sequence of places.

    Blends 0-2 stand before the hue, 3-5 behind it: three operations take theirs in the order that was drawn, the
    other places are idle. The last one is the conversion to grey.
    """
    rank = draws.rank
    place = (rank[:, None, :3] < rank[:, :3, None]).sum(-1) + BLENDS_BEFORE_HUE * (rank[:, 3:] < rank[:, :3])
    taken = place[..., None] == torch.arange(2 * BLENDS_BEFORE_HUE, device=rank.device)
    factors = draws.factors[:, :3, None]
    scale = torch.where(taken, factors, 1.0).prod(1)
    _, mean, luma = torch.where(taken, 1 - factors, 0.0).unbind(1)
    grey = draws.grey[:, None].float()
    return torch.cat((scale, 1 - grey), 1), torch.cat((luma, grey), 1), torch.cat((mean, torch.zeros_like(grey)), 1)


def _possible(how: Photometric, taps: int) -> Steps:
    jittered = [how.jitter_p > 0 and strength > 0 for strength in how.jitter]

    def blends(wanted: bool, last: bool) -> list[bool]:
        return [wanted] * BLENDS_BEFORE_HUE + [wanted and how.jitter_p > 0] * BLENDS_BEFORE_HUE + [last]

    return Steps(
        scale=blends(any(jittered[:3]), how.grey_p > 0),
        luma=blends(jittered[2], how.grey_p > 0),
        mean=blends(jittered[1], False),
        turn=[jittered[3]],
        blur=[how.blur_p > 0] * taps,
        threshold=[how.solarize_p > 0],
    )


def _check_images(images: Tensor, sample_ids: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (B, C, H, W) with C 3 (colours) or 1 (grey), got {got}")
    if len(images) != len(sample_ids):
        raise ValueError(f"sample_ids must have one id per image: {len(sample_ids)} for {len(images)}")
