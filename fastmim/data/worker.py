"""What runs inside a worker process: a request for sample ids becomes a finished uint8 micro-batch."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmim.data.augment import apply_crop, centre_crop, draw_crop
from fastmim.data.decode import DecodeError, decode_image
from fastmim.data.order import augment_random, substitute_file
from fastmim.data.source import FileIndex, read_image_file

_SUBSTITUTES = 64


class Request(NamedTuple):
    """One micro-batch to make."""

    epoch: int
    sample_ids: Tensor


class Result(NamedTuple):
    """One micro-batch made."""

    images: Tensor
    sample_ids: Tensor
    bad: list[tuple[int, str]]  # (file index, reason) of files met and not used
    error: str  # not empty: no substitute was found


class ImageDataset(Dataset[Result]):
    """Turns a request for sample ids into a finished uint8 micro-batch (runs inside the workers).

    A whole micro-batch per item: each image is written once, into its place in the batch, and nothing is
    collated.
    """

    def __init__(
        self,
        index: FileIndex,
        known_bad: frozenset[int],
        *,
        img_size: tuple[int, int],
        in_chans: int,
        seed: int,
        loader: str,
        train: bool,
        scale: Sequence[float],
        ratio: Sequence[float],
        hflip: float,
        interpolation: str,
        min_size: int,
    ) -> None:
        self.index, self.known_bad, self.seed, self.train = index, known_bad, seed, train
        self.img_size, self.interpolation = img_size, interpolation
        self.decode_options: dict[str, Any] = {"in_chans": in_chans, "loader": loader, "min_size": min_size}
        self.crop_options: dict[str, Any] = {"scale": scale, "ratio": ratio, "hflip": hflip}
        self.in_chans = in_chans

    def __getitem__(self, request: Request) -> Result:
        images = torch.empty((len(request.sample_ids), self.in_chans, *self.img_size), dtype=torch.uint8)
        bad: list[tuple[int, str]] = []
        kept: list[int] = []
        for sample_id in request.sample_ids.tolist():
            image = self._usable_image(request.epoch, sample_id, bad)
            if image is not None:
                images[len(kept)] = self._transform(image, request.epoch, sample_id)
                kept.append(sample_id)
            elif self.train:
                error = f"{_SUBSTITUTES} files in a row cannot be used, the last: {self._last(bad)}"
                return Result(images[:0], request.sample_ids[:0], bad, error)
        return Result(images[: len(kept)], torch.tensor(kept, dtype=torch.int64), bad, "")

    def _usable_image(self, epoch: int, sample_id: int, bad: list[tuple[int, str]]) -> Tensor | None:
        """The sample's image, in training that of a stand-in where the file is bad; None without one."""
        file = sample_id % len(self.index)
        for attempt in range(1, _SUBSTITUTES + 1):
            if file not in self.known_bad:
                try:
                    return decode_image(read_image_file(self.index.path(file)), **self.decode_options)
                except DecodeError as err:
                    bad.append((file, str(err)))
            if not self.train:  # a stand-in would count some held-out image twice
                return None
            file = substitute_file(self.seed, epoch, sample_id, attempt, len(self.index))
        return None

    def _transform(self, image: Tensor, epoch: int, sample_id: int) -> Tensor:
        if not self.train:
            return centre_crop(image, self.img_size, self.interpolation)
        rng = augment_random(self.seed, epoch, sample_id)
        crop = draw_crop(image.shape[-2], image.shape[-1], rng=rng, **self.crop_options)
        return apply_crop(image, crop, self.img_size, self.interpolation)

    def _last(self, bad: list[tuple[int, str]]) -> str:
        return f"{self.index.label(bad[-1][0])}: {bad[-1][1]}" if bad else "found bad at the start"


def init_worker(_: int) -> None:
    """Prepare a fresh worker process."""
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The trainer answers them by saving;
    # workers that died first would make the trainer fail instead. They end with the trainer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
