"""The CPU loader: files -> uint8 micro-batches, decoded and cropped in worker processes.

Nothing is random in here: order, crop, flip and the stand-in of a bad file are functions of (seed, epoch,
sample_id), see `order.py`. So the loader carries no state worth saving, and `epoch(e, start=k)` is exactly
the tail of `epoch(e)`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastmim.data.augment import INTERPOLATIONS
from fastmim.data.decode import check_decode_options
from fastmim.data.order import EpochOrder
from fastmim.data.source import check_bad_fraction, find_bad_files, open_index
from fastmim.data.worker import ImageDataset, Request, Result, init_worker

_LOG = logging.getLogger("fastmim")
_NAMES_LOGGED = 20
_NOTICE_SECONDS = 0.5
_PREFETCH = 4  # micro-batches in flight per worker: rides out slow files for 4 * B * C * H * W bytes


class Batch(NamedTuple):
    """One micro-batch on the loader's device."""

    images: Tensor  # uint8 (B, C, H, W)
    sample_ids: Tensor  # int64 (B,)


class _Requests(Sampler[Request]):
    """Micro-batch requests from (epoch, start) on.

    Training runs on into the following epochs, so that workers are already busy with the next epoch while
    the last batches of this one are used.
    """

    def __init__(self, order: EpochOrder) -> None:
        self.order, self.epoch, self.start = order, 0, 0

    def __iter__(self) -> Iterator[Request]:
        epoch, start = self.epoch, self.start
        while True:
            ids = self.order.sample_ids(epoch)
            for i in range(start, self.order.micro_batches):
                # cloned: a slice would be sent to the worker with the whole epoch's storage behind it
                yield Request(epoch, ids[self.order.slice_of(i)].clone())
            if not self.order.train:
                return
            epoch, start = epoch + 1, 0


class Loader:
    """Endless supply of micro-batches, addressed by (epoch, micro-batch index).

    Attributes:
        num_images: files in the index, bad ones included.
        steps_per_epoch: optimiser steps in an epoch, at least 1, equal on every rank. With train=False: the
            number of micro-batches of the rank that has most.
        micro_batches: micro-batches of this rank in an epoch.
        bad_files: {path: reason} of the files found unusable so far, by verification or while training.
        fingerprint: hex digest of file names and order; a restart on a changed folder can be told by it.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: EpochOrder,
        *,
        num_workers: int,
        device: torch.device,
        bad: dict[int, str],
        max_bad_fraction: float,
    ) -> None:
        self.num_images, self.steps_per_epoch = order.num_images, order.steps_per_epoch
        self.micro_batches, self.fingerprint = order.micro_batches, dataset.index.fingerprint
        self.bad_files: dict[str, str] = {}
        self._index, self._device, self._max_bad_fraction = dataset.index, device, max_bad_fraction
        self._note_bad(list(bad.items()))
        self._requests = _Requests(order)
        self._loader: DataLoader[Result] | None = _data_loader(dataset, self._requests, num_workers, device)
        self._stream: Iterator[Result] | None = None
        self._position: tuple[int, int] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of one epoch from index `start` on.

        Training gives exactly ``steps_per_epoch * grad_accum_steps - start`` full ones. With train=False a
        bad file is left out, so that its micro-batch is shorter. Only the latest iterator of a loader may be
        used.

        Raises:
            ValueError: `start` out of range; too many files are bad (`max_bad_fraction`).
            RuntimeError: a worker process died.
        """
        if epoch < 0 or not 0 <= start <= self.micro_batches:
            raise ValueError(f"epoch={epoch}, start={start}: start must lie in 0 … {self.micro_batches}, epoch >= 0")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for i in range(start, self.micro_batches):
            result = self._fetch(epoch, i)
            self._position = (epoch, i + 1) if i + 1 < self.micro_batches else (epoch + 1, 0)
            if not self._requests.order.train and i + 1 == self.micro_batches:
                self._stream = None
            self._note_bad(result.bad)
            if result.error:
                raise ValueError(f"data.path={self._index.root}: {result.error}; run `fastmim data check` on it")
            if len(result.sample_ids):
                yield Batch(
                    result.images.to(self._device, non_blocking=True),
                    result.sample_ids.to(self._device, non_blocking=True),
                )

    def _fetch(self, epoch: int, i: int) -> Result:
        """The given micro-batch: the next one of the running stream, else the first of a new one."""
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        try:
            if self._stream is None or self._position != (epoch, i):
                self._requests.epoch, self._requests.start = epoch, i
                self._stream = iter(self._loader)
            return next(self._stream)
        except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as err:
            if isinstance(err, RuntimeError) and "DataLoader worker" not in str(err):
                raise
            raise RuntimeError(
                f"a data worker process died ({_cause_of_death(err)}): most often memory or /dev/shm is full;"
                " use fewer data.num_workers (0 shows the error itself)"
            ) from err

    def _note_bad(self, bad: list[tuple[int, str]]) -> None:
        for file, reason in bad:
            label = self._index.label(file)
            if label in self.bad_files:
                continue
            self.bad_files[label] = reason
            if len(self.bad_files) <= _NAMES_LOGGED:
                _LOG.warning("bad image skipped: %s: %s", label, reason)
            elif len(self.bad_files) == _NAMES_LOGGED + 1:
                _LOG.warning("more than %d bad images: further ones are counted, not logged", _NAMES_LOGGED)
        check_bad_fraction(self.bad_files, self.num_images, self._max_bad_fraction)

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        # The DataLoader ends its persistent workers when the last reference to its iterator goes.
        self._stream = None
        self._loader = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _data_loader(
    dataset: ImageDataset, requests: _Requests, num_workers: int, device: torch.device
) -> DataLoader[Result]:
    return DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        collate_fn=_identity,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=_PREFETCH if num_workers > 0 else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=init_worker,
        # Without its own generator the DataLoader draws a base seed from the trainer's.
        generator=torch.Generator(),
    )


def _cause_of_death(err: Exception) -> str:
    """What is known about a dead worker, in one line.

    torch reports the signal from its SIGCHLD handler, which may run only after the broken connection was
    noticed: waiting for it here keeps it from going off in the middle of the caller's clean-up.
    """
    if "killed by signal" not in str(err):
        try:
            time.sleep(_NOTICE_SECONDS)
        except RuntimeError as notice:
            err = notice
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def _identity(result: Any) -> Any:
    return result


def build_loader(
    *,
    path: str | os.PathLike[str] | None,
    file_list: str | os.PathLike[str] | None = None,
    img_size: tuple[int, int],
    in_chans: int = 3,
    micro_batch_size: int,
    grad_accum_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    loader: str = "auto",
    num_workers: int = 2,
    train: bool = True,
    scale: Sequence[float] = (0.67, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    interpolation: str = "bilinear",
    max_bad_fraction: float = 0.5,
    verify: str = "auto",
    min_size: int = 8,
    device: torch.device | str = "cpu",
    field: str = "data.path",
) -> Loader:
    """Open a folder or file list of images for pretraining (train=True) or validation.

    Args:
        path: folder of images, searched recursively; with `file_list`, what its entries are relative to.
        img_size, in_chans: (H, W) of the batches in pixels; 1 grey, 3 RGB, 4 RGBA.
        micro_batch_size: images per rank and micro-batch.
        loader: "auto" | "torchvision" | "pil": who decodes.
        num_workers: worker processes; 0 decodes in the calling process.
        train: shuffle, crop and flip; else file order, resize and centre crop.
        scale, ratio: range of the crop's area (fraction of the image) and of its aspect (width / height).
        hflip: probability of the horizontal flip.
        max_bad_fraction: stop when more than this fraction of the files cannot be used.
        verify: "full" decodes every file first, "none" none, "auto" up to 2000 files.
        min_size: images with a shorter side below this many pixels are bad.
        field: the config key that messages about `path` name.

    Raises:
        ValueError: in one line, for every wrong argument, a missing or empty folder, too many bad files.
    """
    check_decode_options(in_chans, loader)
    _check_options(img_size, scale, ratio, hflip, interpolation, num_workers)
    index = open_index(path, file_list, field=field)
    order = EpochOrder(
        num_images=len(index),
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
        train=train,
    )
    bad = find_bad_files(index, verify=verify, in_chans=in_chans, loader=loader, min_size=min_size)
    dataset = ImageDataset(
        index,
        frozenset(bad),
        img_size=(int(img_size[0]), int(img_size[1])),
        in_chans=in_chans,
        seed=seed,
        loader=loader,
        train=train,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=hflip,
        interpolation=interpolation,
        min_size=min_size,
    )
    return Loader(
        dataset,
        order,
        num_workers=num_workers,
        device=torch.device(device),
        bad=bad,
        max_bad_fraction=max_bad_fraction,
    )


def _check_options(
    img_size: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    hflip: float,
    interpolation: str,
    num_workers: int,
) -> None:
    if len(img_size) != 2 or min(img_size) < 1:
        raise ValueError(f"model.img_size={list(img_size)}: must be two positive numbers, height and width")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"data.scale={list(scale)}: must satisfy 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"data.ratio={list(ratio)}: must satisfy 0 < low <= high")
    if not 0 <= hflip <= 1:
        raise ValueError(f"data.hflip={hflip}: must lie in [0, 1]")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"data.interpolation={interpolation!r}: unknown; use one of {', '.join(INTERPOLATIONS)}")
    if num_workers < 0:
        raise ValueError(f"data.num_workers={num_workers}: must not be negative")
