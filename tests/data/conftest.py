"""Image files made here from known arrays, so that every test knows the truth without a decoder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding:DeprecationWarning")


def smooth_rgb(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (H, W, 3): a few random waves, smooth enough to pass JPEG at quality 100 almost unchanged."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    turns = [rng.uniform(0, 2) * y + rng.uniform(0, 2) * x + rng.uniform() for _ in range(3)]
    waves = [np.sin(2 * np.pi * turn) for turn in turns]
    return (127.5 + 100 * np.stack(waves, -1)).round().astype(np.uint8)


def encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    """The bytes PIL writes."""
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def encode_png(
    samples: np.ndarray,
    *,
    bits: int,
    colour: int,
    palette: np.ndarray | None = None,
    trns: bytes | None = None,
) -> bytes:
    """A PNG of integer `samples` (H, W) or (H, W, C), written by hand: PIL writes no 16-bit RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        unpacked = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in unpacked]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    if palette is not None:
        parts.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    if trns is not None:
        parts.append(chunk(b"tRNS", trns))
    parts.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


class Zoo:
    """A folder of good and bad files of 32x32 px, with the truth about each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.truth: dict[str, tuple[np.ndarray, int]] = {}  # name -> (RGB (H, W, 3), largest pixel error)
        self.bad: dict[str, str] = {}  # name -> what its reason must contain
        self._good_files()
        self._bad_files()

    def _add(self, name: str, data: bytes, truth: np.ndarray, bound: int) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.truth[name] = (truth, bound)

    def _good_files(self) -> None:
        # A bound of 4 levels is the loss of JPEG at quality 100 on these waves; PNG must be exact.
        rgb = [smooth_rgb(32, 32, seed) for seed in range(12)]
        for i in range(6):
            data = encode(Image.fromarray(rgb[i]), "JPEG", quality=100, subsampling=0)
            self._add(f"class{i % 2}/deep er/{i}.JPG" if i % 2 else f"{i}.jpeg", data, rgb[i], 4)
        data = encode(Image.fromarray(rgb[6]), "JPEG", quality=100, subsampling=0)
        self._add("写真 ñandú 😀.jpg", data, rgb[6], 4)
        inks = np.concatenate([255 - rgb[7], np.full((32, 32, 1), 64, np.uint8)], -1)
        data = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
        self._add("cmyk.jpg", data, (rgb[7] * (191 / 255)).round().astype(np.uint8), 4)
        wide = np.random.default_rng(0).integers(0, 65536, (32, 32, 3))
        self._add("sixteen.png", encode_png(wide, bits=16, colour=2), (wide >> 8).astype(np.uint8), 0)
        grey = wide[..., 0]
        data = encode_png(grey, bits=16, colour=0)
        self._add("sixteen_grey.png", data, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1), 0)
        palette = np.random.default_rng(1).integers(0, 256, (256, 3))
        picks = np.random.default_rng(2).integers(0, 256, (32, 32))
        data = encode_png(picks, bits=8, colour=3, palette=palette)
        self._add("palette.png", data, palette[picks].astype(np.uint8), 0)

    def _bad_files(self) -> None:
        whole = encode(Image.fromarray(smooth_rgb(32, 32, 99)), "JPEG", quality=90)
        for name, data, reason in (
            ("truncated.jpg", whole[: len(whole) * 2 // 3], "truncated"),
            ("empty.jpg", b"", "empty file"),
            ("text.jpg", b"I am not a photograph.\n", "not an image"),
            ("tiny.png", encode(Image.new("RGB", (1, 1)), "PNG"), "1x1 px is smaller than data.min_size=8"),
        ):
            (self.root / name).write_bytes(data)
            self.bad[name] = reason


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 JPEGs (a prime, so nothing divides it) of different sizes and shapes."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(37):
        image = Image.fromarray(smooth_rgb(40 + 3 * (i % 5), 44 + 5 * (i % 7), i))
        image.save(root / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def make() -> dict[str, Callable[..., object]]:
    """The helpers of this file, for tests that build their own bytes."""
    return {"smooth_rgb": smooth_rgb, "encode": encode, "encode_png": encode_png}
