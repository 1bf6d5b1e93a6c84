"""Random pixels in the place of images: what a run could do if reading cost nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from fastmim.data.loader import Batch
from fastmim.data.order import EpochOrder

#: Images of an epoch: as many as ImageNet-1k has.
NUM_IMAGES = 1_281_167
_POOL = 4


class SyntheticLoader:
    """A few fixed batches of noise on the device, handed out in turn, with real sample ids; see :class:`Loader`."""

    def __init__(
        self, order: EpochOrder, *, img_size: tuple[int, int], in_chans: int, device: torch.device,
        pixels: str = "uint8",
    ) -> None:  # fmt: skip
        self.num_images, self.steps_per_epoch = order.num_images, order.steps_per_epoch
        self.micro_batches = order.micro_batches
        self.bad_files: dict[str, str] = {}
        self.fingerprint = hashlib.sha256(f"synthetic {order.num_images}".encode()).hexdigest()
        self._order, self._device = order, device
        shape = (_POOL, order.micro_batch_size, in_chans, *img_size)
        generator = torch.Generator().manual_seed(order.seed)
        if pixels == "float32":  # of mean 0 and variance 1, as normalised samples
            self._pool = torch.randn(shape, generator=generator).to(device)
        else:
            self._pool = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The micro-batches of one epoch from index `start` on.

        Raises:
            ValueError: `start` out of range.
        """
        if epoch < 0 or not 0 <= start <= self.micro_batches:
            raise ValueError(f"epoch={epoch}, start={start}: start must lie in 0 … {self.micro_batches}, epoch >= 0")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        ids = self._order.sample_ids(epoch).to(self._device)
        for i in range(start, self.micro_batches):
            mine = ids[self._order.slice_of(i)]
            batch = Batch(self._pool[i % _POOL, : len(mine)], mine)
            batch.files = mine % self.num_images
            yield batch

    def close(self) -> None:
        """Nothing to stop."""
