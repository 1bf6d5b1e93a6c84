"""The images that an objective wants of the loader, and what is done to them on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .photometric import Photometric, photometric

Images = Tensor | tuple[Tensor, ...]
"""(B, C, H, W) uint8, or normalised float; of several crops one (count, B, C, h, w) a :class:`View`."""


@dataclass(frozen=True)
class View:
    """``count`` crops of one kind that the loader makes of every image; None: as the data section says.

    ``same_crop``: the boxes, flips and colours of the view before, in another size, and nothing else of its own but
    ``interpolation``. ``photometric`` is not the loader's: :func:`augmented` does it on the device.
    """

    size: tuple[int, int]
    count: int = 1
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float | None = None
    interpolation: str | None = None
    auto_augment: str | None = None
    margin: float | None = None
    same_crop: bool = False
    photometric: Photometric | None = None

    def over(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The loader's arguments: what is given here over ``defaults``."""
        given = {key: value for key, value in vars(self).items() if value is not None and key != "photometric"}
        return {**defaults, **given}


def augmented(images: Images, views: Sequence[View], sample_ids: Tensor, *, seed: int, epoch: int) -> Images:
    """The loader's images after the ``photometric`` of their views, in the same form.

    Crops are numbered through all views, so that every crop of a sample draws its own; those of a view with
    ``same_crop`` have the numbers of the view before.

    Args:
        images: uint8 :data:`Images` of ``views``, which are returned as they are where no view wants anything.
        views: As the objective asked for them.
        sample_ids: (B,) integer, on the device of the images.
        seed, epoch: Further keys.

    Raises:
        ValueError: A view wants it, and its images are not uint8 of 1 or 3 channels.
    """
    if all(view.photometric is None for view in views):
        return images
    if isinstance(images, Tensor):
        return _augmented(images[None], views[0], sample_ids, first=0, seed=seed, epoch=epoch)[0]
    done, first = [], 0
    for crops, view in zip(images, views, strict=True):
        first -= view.count if view.same_crop else 0
        done.append(_augmented(crops, view, sample_ids, first=first, seed=seed, epoch=epoch))
        first += view.count
    return tuple(done)


def _augmented(crops: Tensor, view: View, sample_ids: Tensor, *, first: int, seed: int, epoch: int) -> Tensor:
    if view.photometric is None:
        return crops
    count, batch = crops.shape[:2]
    numbers = torch.arange(first, first + count, device=sample_ids.device).repeat_interleave(batch)
    flat, ids = crops.flatten(0, 1), sample_ids.repeat(count)
    return photometric(flat, ids, seed=seed, epoch=epoch, crop=numbers, how=view.photometric).view_as(crops)
