"""Which sample is where: the order of an epoch, its split over ranks, and the random key of every sample.

Everything here is a pure function of its arguments: no state, no global generator. That is what makes a
restart, another number of workers or (for a fixed global batch) another number of ranks see the same samples.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.wording import plural

_LOG = logging.getLogger("fastmim")
# Independent streams of one seed: without the tag, sample 0's crop and the epoch's shuffle would share a key.
_SHUFFLE, _AUGMENT, _SUBSTITUTE, _SOURCE = 1, 2, 3, 4


class Span(NamedTuple):
    """Files that lie one behind the other in the index, and the weight of their share of the samples."""

    start: int
    files: int
    weight: float


def _random(stream: int, seed: int, epoch: int, number: int, attempt: int = 0) -> random.Random:
    """A fresh generator for one purpose; the key keeps all bits of every argument, so no two are alike.

    Python's Mersenne Twister: made in 5 µs, ten times faster than NumPy's or torch's, and `random()` of a
    given integer seed is the same in every version of Python.
    """
    key = stream
    for part in (seed, epoch, number, attempt):
        key = key << 64 | part
    return random.Random(key)


def augment_random(seed: int, epoch: int, sample_id: int) -> random.Random:
    """The generator that draws the augmentation of one sample in one epoch."""
    return _random(_AUGMENT, seed, epoch, sample_id)


def substitute_file(seed: int, epoch: int, sample_id: int, attempt: int, num_images: int) -> int:
    """Index of the file that stands in for a bad one; `attempt` counts from 1."""
    return int(_random(_SUBSTITUTE, seed, epoch, sample_id, attempt).random() * num_images)


class EpochOrder:
    """The micro-batches of one rank.

    Training: micro-batch i of rank r holds positions (i * world_size + r) * m … + m of the epoch's
    permutation, so the union over an optimiser step depends on the global batch only. The incomplete last
    global batch is dropped. With fewer files than one global batch, several permutations of the same epoch
    are joined and sample_id = file index + num_images * repeat.

    With `spans` an epoch has as many samples, but each span gives the share that its weight says: permutations of its
    own files one after the other, the last one cut off, and all spans shuffled together.

    Not training: file order, no repeats, nothing dropped: the last micro-batch may be short, and ranks may
    have one micro-batch more or less than others.
    """

    def __init__(
        self,
        *,
        num_images: int,
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train: bool = True,
        spans: Sequence[Span] | None = None,
    ) -> None:
        _check_counts(micro_batch_size, grad_accum_steps, rank, world_size, seed)
        self.num_images, self.micro_batch_size = num_images, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.train, self.spans = seed, train, spans
        global_micro_batch = micro_batch_size * world_size
        if train:
            global_batch = global_micro_batch * grad_accum_steps
            self.steps_per_epoch = max(1, num_images // global_batch)
            self.micro_batches = self.steps_per_epoch * grad_accum_steps
            self.repeats = -(-self.steps_per_epoch * global_batch // num_images)
            if self.repeats > 1:
                _LOG.warning(
                    "%s, fewer than one global batch of %d: each is used up to %d times per epoch,"
                    " with another crop and mask each time", plural(num_images, "image"), global_batch, self.repeats,
                )  # fmt: skip
            for span, share in zip(spans or (), shares(spans or (), num_images * self.repeats), strict=True):
                if not share:
                    _LOG.warning(
                        "data.weights: %g of %g gives no sample an epoch: its %s not used", span.weight,
                        sum(one.weight for one in spans or ()), plural(span.files, "image is", "images are"),
                    )  # fmt: skip
        else:
            self.steps_per_epoch = -(-num_images // global_micro_batch)
            mine = num_images - rank * micro_batch_size
            self.micro_batches = max(0, -(-mine // global_micro_batch))
            self.repeats = 1

    def sample_ids(self, epoch: int) -> Tensor:
        """int64 sample ids of a whole epoch over all ranks, in order, the part that is dropped included."""
        if not self.train:
            return torch.arange(self.num_images)
        if self.spans:
            return self._weighted(epoch, self.spans)
        parts = []
        for repeat in range(self.repeats):
            key = _random(_SHUFFLE, self.seed, epoch, repeat).getrandbits(63)
            parts.append(_permutation(self.num_images, key) + self.num_images * repeat)
        return torch.cat(parts)

    def _weighted(self, epoch: int, spans: Sequence[Span]) -> Tensor:
        parts = []
        for number, (span, share) in enumerate(zip(spans, shares(spans, self.num_images * self.repeats), strict=True)):
            for repeat in range(-(-share // span.files)):
                key = _random(_SOURCE, self.seed, epoch, number, repeat).getrandbits(63)
                taken = _permutation(span.files, key)[: share - repeat * span.files]
                parts.append(taken + span.start + self.num_images * repeat)
        ids = torch.cat(parts)
        return ids[_permutation(len(ids), _random(_SHUFFLE, self.seed, epoch, 0).getrandbits(63))]

    def slice_of(self, micro_batch: int) -> slice:
        """Where in `sample_ids(epoch)` this rank's micro-batch lies."""
        start = (micro_batch * self.world_size + self.rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def shares(spans: Sequence[Span], total: int) -> list[int]:
    """How many of `total` samples each span gives: its weight's part, the rest to the largest fractions."""
    whole = sum(span.weight for span in spans)
    exact = [total * span.weight / whole for span in spans]
    counts = [int(part) for part in exact]
    by_fraction = sorted(range(len(spans)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_fraction[: total - sum(counts)]:
        counts[k] += 1
    return counts


def _permutation(count: int, key: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(key))


def _check_counts(micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int, seed: int) -> None:
    for name, value in (("micro_batch_size", micro_batch_size), ("grad_accum_steps", grad_accum_steps)):
        if value < 1:
            raise ValueError(f"train.{name}={value}: must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must lie in 0 … world_size-1 = {world_size - 1}")
    if seed < 0:
        raise ValueError(f"train.seed={seed}: must not be negative")
