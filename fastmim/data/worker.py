"""What runs inside a worker process: a request for sample ids becomes a finished micro-batch.

Two kinds share the choice of file, the crops and the stand-ins: pixels, for the torchvision loader, and encoded
bytes with their crops, for DALI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmim.data.augment import Crop, View, apply_crop, centre_crop, draw_crops
from fastmim.data.decode import DecodeError, decode_image, plain_jpeg
from fastmim.data.index import ImageIndex
from fastmim.data.notes import with_notes
from fastmim.data.order import Span, augment_random, substitute_file
from fastmim.data.orientation import orientation_of
from fastmim.data.pool import nothing_held
from fastmim.data.rand_augment import rand_augment

_SUBSTITUTES = 64
NO_FILES = torch.zeros(0, dtype=torch.int64)
T = TypeVar("T")


class Request(NamedTuple):
    """One micro-batch to make."""

    epoch: int
    sample_ids: Tensor


class Result(NamedTuple):
    """One micro-batch made."""

    views: list[Tensor]  # one a View, uint8 or float32 (count, B, C, h, w)
    crops: Tensor  # int32 (sum of counts, B, 6): top, left, height, width, flip, turns
    sample_ids: Tensor
    bad: list[tuple[int, str]]  # (file index, reason) of files met and not used
    error: str  # not empty: no substitute was found
    notes: Sequence[tuple[int, str]] = ()  # (file index, what its decoder warned of) of files used
    files: Tensor = NO_FILES  # int64 (B,), the files used, stand-ins included


class Encoded(NamedTuple):
    """One micro-batch ready for a decoder elsewhere."""

    data: Tensor  # uint8 (bytes,), one image behind the other
    ends: Tensor  # int64 (B,)
    crops: Tensor  # int32 (sum of counts, B, 6)
    files: Tensor  # int64 (B,), the files used, stand-ins included
    sample_ids: Tensor
    bad: list[tuple[int, str]]
    error: str
    notes: Sequence[tuple[int, str]] = ()


class SampleDataset:
    """Chooses the file of a sample: its own, in training a stand-in's where that is bad."""

    def __init__(
        self,
        index: ImageIndex,
        known_bad: frozenset[int],
        *,
        views: Sequence[View],
        in_chans: int,
        seed: int,
        decoder: str,
        train: bool,
        spans: Sequence[Span] | None = None,
        **reading: Any,
    ) -> None:
        """`reading`: further arguments of :func:`~fastmim.data.decode.decode_image`."""
        self.index, self.known_bad, self.seed, self.train = index, known_bad, seed, train
        self.views, self.in_chans = tuple(views), in_chans
        self._notes: list[tuple[int, str]] = []
        self.holding: Callable[[int], None] = nothing_held
        self.spans = spans or [Span(0, len(index), 1.0)]
        self.decode_options: dict[str, Any] = {"in_chans": in_chans, "loader": decoder, **reading}
        self.dtype = torch.float32 if reading.get("pixels") == "float32" else torch.uint8

    def __getitem__(self, request: Request) -> Any:
        raise NotImplementedError

    def usable(
        self, epoch: int, sample_id: int, bad: list[tuple[int, str]], use: Callable[[int], T]
    ) -> tuple[int, T] | None:
        """The first (file, use(file)) that raises no DecodeError; None without one."""
        file = sample_id % len(self.index)
        # A stand-in comes out of the same span, so that bad files do not move the shares.
        span = next(span for span in reversed(self.spans) if span.start <= file)
        for attempt in range(1, _SUBSTITUTES + 1):
            if file not in self.known_bad:
                try:
                    return file, self._noting(file, use)
                except DecodeError as err:
                    bad.append((file, str(err)))
            if not self.train:  # a stand-in would count some held-out image twice
                return None
            file = span.start + substitute_file(self.seed, epoch, sample_id, attempt, span.files)
        return None

    def _noting(self, file: int, use: Callable[[int], T]) -> T:
        self.holding(file)
        used, said = with_notes(use, file)
        self._notes += [(file, line) for line in said]
        return used

    def notes(self) -> list[tuple[int, str]]:
        """(file, warning) of the files used since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def crops(self, epoch: int, sample_id: int, height: int, width: int) -> list[Crop]:
        """Where this sample is cut in this epoch, one crop after the other."""
        return draw_crops(self.views, height, width, augment_random(self.seed, epoch, sample_id))

    def no_substitute(self, bad: list[tuple[int, str]]) -> str:
        """The message when `usable` found nothing."""
        last = f"{self.index.label(bad[-1][0])}: {bad[-1][1]}" if bad else "found bad at the start"
        return f"{_SUBSTITUTES} files in a row cannot be used, the last: {last}"


class ImageDataset(SampleDataset):
    """Pixels. A whole micro-batch per item: each crop is written once, into its place, and nothing is collated."""

    def __getitem__(self, request: Request) -> Result:
        count = len(request.sample_ids)
        views = [torch.empty((v.count, count, self.in_chans, *v.size), dtype=self.dtype) for v in self.views]
        crops = torch.zeros((sum(v.count for v in self.views), count, len(Crop._fields)), dtype=torch.int32)
        bad: list[tuple[int, str]] = []
        kept: list[int] = []
        files: list[int] = []
        for sample_id in request.sample_ids.tolist():
            found = self.usable(request.epoch, sample_id, bad, self._decode)
            if found is not None:
                self._write(found[1], request.epoch, sample_id, views, crops, len(kept))
                kept.append(sample_id)
                files.append(found[0])
            elif self.train:
                return Result([], crops, request.sample_ids[:0], bad, self.no_substitute(bad))
        ids = torch.tensor(kept, dtype=torch.int64)
        if len(kept) < count:
            views, crops = [view[:, : len(kept)].clone() for view in views], crops[:, : len(kept)].clone()
        return Result(views, crops, ids, bad, "", self.notes(), torch.tensor(files, dtype=torch.int64))

    def _decode(self, file: int) -> Tensor:
        return decode_image(self.index.read(file), **self.decode_options)

    def _write(
        self, image: Tensor, epoch: int, sample_id: int, views: list[Tensor], crops: Tensor, place: int
    ) -> None:
        if not self.train:
            view = self.views[0]
            views[0][0, place] = centre_crop(image, view.size, view.interpolation, view.margin)
            return
        drawn = self.crops(epoch, sample_id, image.shape[-2], image.shape[-1])
        crops[:, place] = torch.tensor(drawn, dtype=torch.int32)
        rest = iter(drawn)
        for view, out in zip(self.views, views, strict=True):
            for k in range(view.count):
                crop = apply_crop(image, next(rest), view.size, view.interpolation)
                if view.auto_augment:
                    crop = rand_augment(crop, view.auto_augment, augment_random(self.seed, epoch, sample_id))
                out[k, place] = crop


class EncodedDataset(SampleDataset):
    """Bytes and crops. What decoders disagree about (CMYK, 16 bits, alpha, other formats) is decoded here, by
    `decode_image`, and handed on as an uncompressed PNM image: it then has the same pixels in every loader.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_host: frozenset[int] = frozenset()  # JPEGs that the other decoder is known to refuse

    def __getitem__(self, request: Request) -> Encoded:
        data: list[bytes | bytearray] = []
        crops: list[list[Crop]] = []
        files: list[int] = []
        bad: list[tuple[int, str]] = []
        for sample_id in request.sample_ids.tolist():
            found = self.usable(request.epoch, sample_id, bad, self._encode)
            if found is None:
                empty = torch.zeros(0, dtype=torch.int64)
                return Encoded(empty, empty, empty, empty, empty, bad, self.no_substitute(bad))
            file, (encoded, height, width) = found
            files.append(file)
            data.append(encoded)
            crops.append(self.crops(request.epoch, sample_id, height, width))
        joined = torch.from_numpy(np.frombuffer(bytearray().join(data), dtype=np.uint8))
        ends = torch.tensor([len(part) for part in data]).cumsum(0)
        table = torch.tensor(crops, dtype=torch.int32).transpose(0, 1).contiguous()
        return Encoded(joined, ends, table, torch.tensor(files), request.sample_ids, bad, "", self.notes())

    def _encode(self, file: int) -> tuple[bytes | bytearray, int, int]:
        return self.encode(file, as_is=file not in self.on_host)

    def encode(self, file: int, *, as_is: bool = True) -> tuple[bytes | bytearray, int, int]:
        """(bytes, H, W) of a file; `as_is=False` decodes JPEGs here too."""
        data = self.index.read(file)
        own = self.decode_options
        # A decoder elsewhere knows of no range, and of no orientation.
        frame = plain_jpeg(data, own.get("min_size", 1)) if as_is and own.get("value_range") is None else None
        if frame is not None and not (own.get("exif_orientation") and orientation_of(data) != 1):
            return data, frame.height, frame.width
        image = decode_image(data, **self.decode_options)
        return encode_pnm(image), image.shape[-2], image.shape[-1]


def encode_pnm(image: Tensor) -> bytes:
    """uint8 (1 or 3, H, W) as a binary PGM or PPM file."""
    chans, height, width = image.shape
    head = f"P{'5' if chans == 1 else '6'}\n{width} {height}\n255\n".encode()
    return head + image.permute(1, 2, 0).contiguous().numpy().tobytes()
