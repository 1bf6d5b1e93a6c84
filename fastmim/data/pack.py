"""``fastmim data pack``: images into tar shards with their index, smaller if wanted, and read back at the end."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastmim.data.decode import DecodeError, decode_image, read_samples
from fastmim.data.index import ImageIndex
from fastmim.data.names import printable
from fastmim.data.samples import to_pixels
from fastmim.data.shards import open_shards
from fastmim.data.source import open_index
from fastmim.data.tar_index import Member, write_index
from fastmim.wording import plural

NAMES = "names.txt"
_IN_FLIGHT = 64  # images held in memory at once


class PackReport(NamedTuple):
    """What was written."""

    shards: list[str]
    images: int
    total_bytes: int
    bad: dict[str, str]  # {source: reason} of what was left out


class _Packed(NamedTuple):
    data: bytes | bytearray
    extension: str


def pack_images(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    shard_bytes: int = 1 << 30,
    short_side: int | None = None,
    quality: int = 90,
    min_size: int = 8,
    in_chans: int = 3,
    pixels: str = "uint8",
    num_threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **reading: Any,
) -> PackReport:
    """Write the images of a folder (or of other shards) into `target`/shard-000000.tar, … with an index beside each.

    The order is the source's, so an unchanged copy gives the same batches as the source. Files that cannot be
    decoded are left out. ``names.txt`` holds the source of every image, a line each. Every image is read back.

    Args:
        shard_bytes: a shard is closed when the next image would exceed this.
        short_side: images with a larger short side are resized to it (antialiased bicubic) and stored as JPEG;
            all others, those with more than JPEG holds (samples of more than 8 bits, a fourth channel), and all
            without this, are copied byte for byte.
        quality: of those JPEGs, 1 to 100.
        in_chans, pixels, reading: with "float32" arrays are images too, and every file is decoded as a run with these
            arguments of :func:`~fastmim.data.decode.decode_image` does, and copied; not with `short_side`.
        progress: called with (stage, done, total); stage is "pack" or "verify".

    Raises:
        ValueError: an argument is out of range, `target` is not empty, or no image can be used; an image cannot be
            read back.
    """
    if short_side is not None and short_side < min_size:
        raise ValueError(f"--short-side {short_side}: must be at least {min_size} pixels")
    if short_side is not None and pixels == "float32":
        raise ValueError(f"--short-side {short_side}: makes JPEGs, which do not hold data.pixels=float32; leave it out")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality {quality}: must lie in 1 … 100")
    if shard_bytes < 1:
        raise ValueError(f"--shard-mb: must be positive, got {shard_bytes} bytes")
    target = os.fspath(target)
    index = open_index(source, field="DIR", pixels=pixels)
    reading |= dict(in_chans=in_chans, pixels=pixels)
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise ValueError(f"{printable(target)}: exists and is not an empty folder; choose another")
    os.makedirs(target, exist_ok=True)
    tell = progress or (lambda stage, done, total: None)
    bad: dict[str, str] = {}

    def prepare(number: int) -> tuple[int, _Packed | DecodeError]:
        try:
            return number, _prepare(index, number, short_side, quality, min_size=min_size, **reading)
        except DecodeError as err:
            return number, err

    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool, _Writer(target, shard_bytes) as out:
        for number, packed in _bounded_map(pool, prepare, len(index)):
            if isinstance(packed, DecodeError):
                bad[index.label(number)] = str(packed)
            else:
                out.add(packed, index.label(number))
            tell("pack", number + 1, len(index))
        if not out.images:
            raise ValueError(f"DIR={printable(index.root)}: none of {plural(len(index), 'image')} can be used")
    _verify(out, tell, **reading)
    return PackReport(out.shards, out.images, sum(os.path.getsize(shard) for shard in out.shards), bad)


def _prepare(
    index: ImageIndex, number: int, short_side: int | None, quality: int, *, min_size: int, **reading: Any
) -> _Packed:
    data, extension = index.read(number), os.path.splitext(index.label(number))[1].lower()
    if reading["pixels"] == "float32":
        decode_image(data, min_size=min_size, **reading)
        return _Packed(data, extension)
    samples = read_samples(data, in_chans=3, loader="auto", min_size=min_size)
    fits_a_jpeg = samples.colour.dtype == "uint8" and samples.fourth is None
    if short_side is None or min(samples.colour.shape[-2:]) <= short_side or not fits_a_jpeg:
        return _Packed(data, extension)
    image = to_pixels(samples, in_chans=3)
    height, width = image.shape[-2:]
    factor = short_side / min(height, width)
    size = [max(short_side, round(height * factor)), max(short_side, round(width * factor))]
    image = tv.resize_image(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=quality)
    return _Packed(buffer.getvalue(), ".jpg")


def _bounded_map(pool: ThreadPoolExecutor, work: Callable[[int], Any], count: int) -> Iterator[Any]:
    """``pool.map`` that holds no more than a fixed number of results."""
    numbers = iter(range(count))
    running = [pool.submit(work, number) for number in islice(numbers, _IN_FLIGHT)]
    while running:
        yield running.pop(0).result()
        running += [pool.submit(work, number) for number in islice(numbers, 1)]


class _Writer:
    """Shards, one after the other; each appears under its name when it is complete, its index after it."""

    def __init__(self, folder: str, shard_bytes: int) -> None:
        self.shards: list[str] = []
        self.images = 0
        self._folder, self._shard_bytes = folder, shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._members: list[Member] = []
        self._names: list[str] = []

    def add(self, packed: _Packed, source: str) -> None:
        """Append one image; members are numbered, and so named safely whatever the source was called."""
        if self._tar is not None and self._tar.offset + len(packed.data) + 1024 > self._shard_bytes:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path() + ".tmp", "w", format=tarfile.USTAR_FORMAT)
        info = tarfile.TarInfo(f"{self.images:09d}{packed.extension}")
        info.size = len(packed.data)  # and date 0: the same images give the same bytes
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(packed.data))
        self._members.append(Member(info.name, offset, info.size))
        self._names.append(" ".join(source.splitlines()) + "\n")
        self.images += 1

    def _path(self) -> str:
        return os.path.join(self._folder, f"shard-{len(self.shards):06d}.tar")

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        os.replace(self._path() + ".tmp", self._path())
        write_index(self._path(), [[member] for member in self._members])
        self.shards.append(self._path())
        self._tar, self._members = None, []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
            with open(os.path.join(self._folder, NAMES), "w", encoding="utf-8") as file:
                file.writelines(self._names)
        elif self._tar is not None:
            with suppress(OSError):  # a full disk refuses the end of the archive too
                self._tar.close()
            os.unlink(self._path() + ".tmp")


def _verify(out: _Writer, tell: Callable[[str, int, int], None], **reading: Any) -> None:
    index = open_shards(out.shards[0], out.shards, pixels=reading["pixels"])
    if len(index) != out.images:
        raise ValueError(f"{printable(out.shards[0])}: holds {plural(len(index), 'image')} of {out.images} written")
    for number in range(len(index)):
        try:
            if reading["pixels"] == "float32":
                decode_image(index.read(number), **reading)
            else:
                read_samples(index.read(number), in_chans=3, loader="auto", min_size=1)
        except DecodeError as err:
            raise ValueError(f"{index.label(number)}: cannot be read back ({err}); pack again") from None
        tell("verify", number + 1, len(index))
