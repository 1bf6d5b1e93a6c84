"""What every loader of files is: micro-batches addressed by (epoch, index), out of worker processes.

Nothing is random in here: order, crop, flip and the stand-in of a bad file are functions of (seed, epoch,
sample_id), see `order.py`. So the loader carries no state worth saving, and `epoch(e, start=k)` is exactly
the tail of `epoch(e)`.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util  # noqa: F401 - first: exit handlers run in reverse order, and ours must be earlier
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmim.data.order import EpochOrder
from fastmim.data.pool import WorkerPool
from fastmim.data.source import check_bad_fraction
from fastmim.data.worker import NO_FILES, Request, Result, SampleDataset
from fastmim.data.worker_error import DataWorkerError, with_fix

_LOG = logging.getLogger("fastmim")
_NAMES_LOGGED = 20
_RATE_AFTER = 1000  # files read before their share of bad ones is judged
#: Micro-batches in flight per worker: rides out slow files for 4 * B * C * H * W bytes, of float32 four times that.
PREFETCH = 4


_OPEN: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # At exit multiprocessing ends the workers with a SIGTERM, which they do not heed, and waits for them.
    for loader in list(_OPEN):
        loader.close()


class _Pair(NamedTuple):
    images: Tensor  # uint8 (B, C, H, W); float32, normalised, NaN for no data, with data.pixels=float32
    sample_ids: Tensor  # int64 (B,)


class Batch(_Pair):
    """One micro-batch on the loader's device: ``images, sample_ids``."""

    #: int64 (B,), numbers in the loader's index of the files that were used; of a bad one its stand-in's.
    files: Tensor = NO_FILES


class _Crops(NamedTuple):
    views: tuple[Tensor, ...]  # one a View, uint8 or float32 (count, B, C, h, w), as in Batch
    crops: Tensor  # int32 (sum of counts, B, 6): top, left, height, width in source pixels, flip, quarter turns left
    sample_ids: Tensor  # int64 (B,)


class MultiBatch(_Crops):
    """One micro-batch of several crops an image, on the loader's device; the crops stay on the host."""

    #: As :class:`Batch` has them.
    files: Tensor = NO_FILES


class _Requests:
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
        noted_files: {path: what its decoder warned of} of files that are used all the same.
        stop: looked at while waiting for data; once it is true, WaitInterrupted is raised instead of waiting on.
        index: the images, in the order of their numbers.
        fingerprint: hex digest of file names and order; a restart on a changed folder can be told by it.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        order: EpochOrder,
        *,
        num_workers: int,
        device: torch.device,
        bad: dict[int, str],
        max_bad_fraction: float,
        pin_memory: bool | None = None,
    ) -> None:
        self.num_images, self.steps_per_epoch = order.num_images, order.steps_per_epoch
        self.micro_batches, self.fingerprint = order.micro_batches, dataset.index.fingerprint
        self.bad_files: dict[str, str] = {}
        self.noted_files: dict[str, str] = {}
        self.stop: Callable[[], bool] = lambda: False
        self._met, self._failed = 0, 0
        self.index, self._device, self._max_bad_fraction = dataset.index, device, max_bad_fraction
        self._note_bad(list(bad.items()))
        self._requests = _Requests(order)
        self._multi = len(dataset.views) > 1 or dataset.views[0].count > 1
        on_gpu = device.type == "cuda"
        self._pin_memory = on_gpu if pin_memory is None else pin_memory
        self._source, self._num_workers, self._closed = dataset, num_workers, False
        self._pool: WorkerPool | None = None
        # A stream of its own: the copy of this micro-batch runs beside the kernels of the step before.
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._stream: Iterator[Result] | None = None
        _OPEN.add(self)
        self._position: tuple[int, int] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The micro-batches of one epoch from index `start` on: a Batch each, with several crops a MultiBatch.

        Training gives exactly ``steps_per_epoch * grad_accum_steps - start`` full ones. With train=False a
        bad file is left out, so that its micro-batch is shorter. Only the latest iterator of a loader may be
        used.

        Raises:
            ValueError: `start` out of range; more than `max_bad_fraction` of the files are bad, or of those read
                so far once they are 1,000.
            DataWorkerError: the worker processes cannot go on.
        """
        if epoch < 0 or not 0 <= start <= self.micro_batches:
            raise ValueError(f"epoch={epoch}, start={start}: start must lie in 0 … {self.micro_batches}, epoch >= 0")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        for i in range(start, self.micro_batches):
            result = self._fetch(epoch, i)
            self._position = (epoch, i + 1) if i + 1 < self.micro_batches else (epoch + 1, 0)
            if not self._requests.order.train and i + 1 == self.micro_batches:
                self._stream = None
            self._note_bad(result.bad)
            self._note(result.notes)
            self._check_rate(len(result.sample_ids), len(result.bad))
            if result.error:
                raise ValueError(f"data.path={self.index.root}: {result.error}; run `fastmim data check` on it")
            if len(result.sample_ids):
                yield self._batch(result)

    def _batch(self, result: Result) -> Any:
        views = tuple(self._to_device(view) for view in result.views)
        ids = self._to_device(result.sample_ids)
        batch = MultiBatch(views, result.crops, ids) if self._multi else Batch(views[0][0], ids)
        batch.files = self._to_device(result.files)
        return batch

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._copies is None or tensor.device == self._device:
            return tensor.to(self._device)
        with torch.cuda.stream(self._copies):
            moved = tensor.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        moved.record_stream(current)  # else its memory could be given out again while a kernel still reads it
        return moved

    def _open_stream(self) -> Iterator[Result]:
        """Finished micro-batches, from the position in `self._requests` on."""
        return self._items()

    def _items(self) -> Iterator[Any]:
        """What the workers make, from the position in `self._requests` on."""
        if self._num_workers == 0:
            return map(self._source.__getitem__, self._requests)
        if self._pool is None:
            self._pool = WorkerPool(
                self._source,
                self._num_workers,
                ahead=PREFETCH,
                label=self.index.label,
                crashed=lambda file, reason: self._note_bad([(file, reason)]),
            )
            self._pool.stop = lambda: self.stop()
        return self._pool.items(iter(self._requests), pin_memory=self._pin_memory)

    def _fetch(self, epoch: int, i: int) -> Result:
        """The given micro-batch: the next one of the running stream, else the first of a new one."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._stream is None or self._position != (epoch, i):
            self._requests.epoch, self._requests.start = epoch, i
            self._stream = self._open_stream()
        try:
            return next(self._stream)
        except DataWorkerError:
            raise
        except OSError as err:
            raise DataWorkerError(f"data.path={self.index.root}: cannot be read: {with_fix(err)}") from None

    def _note_bad(self, bad: list[tuple[int, str]]) -> None:
        for file, reason in bad:
            label = self.index.label(file)
            if label in self.bad_files:
                continue
            self.bad_files[label] = reason
            if len(self.bad_files) <= _NAMES_LOGGED:
                _LOG.warning("bad image skipped: %s: %s", label, reason)
            elif len(self.bad_files) == _NAMES_LOGGED + 1:
                _LOG.warning("more than %d bad images: further ones are counted, not logged", _NAMES_LOGGED)
        check_bad_fraction(self.bad_files, self.num_images, self._max_bad_fraction)

    def _note(self, notes: Iterable[tuple[int, str]]) -> None:
        for file, said in notes:
            label = self.index.label(file)
            if label not in self.noted_files:
                self.noted_files[label] = said
                if len(self.noted_files) <= _NAMES_LOGGED:
                    _LOG.warning("image used as its decoder gives it: %s: %s", label, said)

    def _check_rate(self, used: int, failed: int) -> None:
        """Stop a run on mostly bad data early: all of its files would have to be met before they are a share."""
        self._met, self._failed = self._met + used + failed, self._failed + failed
        if self._met >= _RATE_AFTER and self._failed > self._max_bad_fraction * self._met:
            label, reason = next(reversed(self.bad_files.items()))
            raise ValueError(
                f"data.max_bad_fraction={self._max_bad_fraction:g}: {self._failed} of the first {self._met} files read"
                f" cannot be used (the last: {label}: {reason}); run `fastmim data check` on {self.index.root}"
            )

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        self._stream, self._closed = None, True
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
