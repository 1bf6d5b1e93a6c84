"""Damaged images of five formats through every way into the house: run as a process, since a decoder may kill it.

    python fuzz.py FOLDER NUMBER
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("png", "jpeg", "webp", "gif", "tiff")
EDGE = 16


def seeds(fmt: str) -> list[bytes]:
    """Sound files of one format, each of another kind."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8))
    rgb = rgb.resize((EDGE // 4, EDGE // 4)).resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    grey, alpha, palette = rgb.convert("L"), rgb.convert("RGBA"), rgb.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    kinds: dict[str, list[tuple[Image.Image, dict[str, object]]]] = {
        "png": [
            (rgb, {}), (grey, {}), (alpha, {}), (deep, {}), (grey.convert("1"), {}), (palette, {"transparency": 3}),
        ],
        "jpeg": [
            (rgb, {"quality": 90}),
            (rgb, {"quality": 70, "progressive": True}),
            (grey, {}),
            (rgb.convert("CMYK"), {}),
            (rgb, {"subsampling": 0, "restart_marker_blocks": 1}),
        ],
        "webp": [(rgb, {}), (rgb, {"lossless": True}), (alpha, {}), (alpha, {"lossless": True})],
        "gif": [(palette, {}), (palette, {"transparency": 3}), (grey, {"interlace": 1})],
        "tiff": [
            *[(rgb, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")],
            (deep, {"compression": "tiff_lzw"}),
            (palette, {}),
        ],
    }
    return [_encoded(image, fmt, options) for image, options in kinds[fmt]]


def _encoded(image: Image.Image, fmt: str, options: dict[str, object]) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def damaged(fmt: str, number: int) -> Iterator[bytes]:
    """`number` files: flipped bits, cuts, wrong sizes; every third PNG has its checksums put right again."""
    chance, files = random.Random(number), seeds(fmt)
    for i in range(number):
        data = bytearray(chance.choice(files))
        how = chance.random()
        if how < 0.2:
            del data[chance.randrange(1, len(data)) :]
        elif how < 0.3 and fmt == "png":
            struct.pack_into(">I", data, 16 + 4 * chance.randrange(2), chance.choice((0, 1, 15, 17, 999, 1 << 31)))
        elif how < 0.4:
            place = chance.randrange(len(data))
            data[place : place + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
        else:
            for _ in range(chance.choice((1, 1, 1, 2, 8))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield bytes(with_checksums(data) if fmt == "png" and i % 3 == 0 else data)


def with_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks have right checksums, as far as its lengths can be followed."""
    pos = 8
    while pos + 12 <= len(data):
        end = pos + 8 + int.from_bytes(data[pos : pos + 4], "big")
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[pos + 4 : end]))
        pos = end + 4
    return data


def write(folder: Path, number: int) -> None:
    """The same files loose and in a shard. GIFs are named .png: what a file is stands in its bytes."""
    (folder / "loose").mkdir(parents=True)
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "a.tar", "w") as tar:
        for fmt in FORMATS:
            for i, data in enumerate([*seeds(fmt), *damaged(fmt, number)]):
                member = tarfile.TarInfo(f"{fmt}{i:05d}.{'png' if fmt == 'gif' else fmt}")
                member.size = len(data)
                (folder / "loose" / member.name).write_bytes(data)
                tar.addfile(member, io.BytesIO(data))


def main(folder: Path, number: int) -> None:
    """Print as JSON what each way found bad."""
    from fastmim.data import build_loader, check_images

    write(folder, number)
    found = {"check": check_images(folder / "loose")[1]}
    options = dict(img_size=(8, 8), micro_batch_size=50, max_bad_fraction=1.0, verify="none", train=False)
    for name, path, loader in (("shards", "tars", "torchvision"), ("pil", "loose", "pil")):
        with build_loader(path=folder / path, loader=loader, num_workers=2, **options) as images:
            shown = sum(len(batch.images) for batch in images.epoch(0))
            found[name] = images.bad_files
            assert shown + len(images.bad_files) == images.num_images
    short = {way: {re.split("[/!]", name)[-1]: why for name, why in bad.items()} for way, bad in found.items()}
    print(json.dumps(short))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
