"""Damaged files never end a process, and every way in finds the same ones bad. The work is in fuzz.py."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data.decode import DecodeError, decode_image
from fastmim.data.png import checked_png
from tests.data import fuzz

NUMBER = 2000  # damaged files a format


def test_damaged_files_through_every_loader(tmp_path):
    source = Path(fuzz.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(source), str(tmp_path / "files"), str(NUMBER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert not [line for bad in found.values() for line in bad.values() if "crashed" in line]
    assert found["check"] == found["shards"]
    for fmt in fuzz.FORMATS:
        bad = {name for name in found["check"] if name.startswith(fmt)}
        assert NUMBER // 2 < len(bad) < NUMBER  # the damage is neither always nor never seen
        assert not bad & {f"{fmt}{i:05d}.{fmt}" for i in range(len(fuzz.seeds(fmt)))}
        # the decoders may differ on a damaged JPEG, and on nothing else
        other = {name for name in found["pil"] if name.startswith(fmt)}
        assert bad == other or (fmt == "jpeg" and len(bad ^ other) < NUMBER // 100)
    # nothing that a decoder says is left without a name
    ours = ("bad image skipped: ", "image used as", "more than 20", "data.path=")
    of_all = re.compile("images in all are used|of the images looked at")
    said = [line for line in done.stderr.splitlines() if not of_all.search(line)]
    assert not [line for line in said if not line.startswith(ours)]


def test_every_single_flipped_bit_of_a_png_is_found():
    # all but those in the length of IEND and behind it, which no pixel depends on
    data = fuzz.seeds("png")[0]
    sound = decode_image(data)
    for place, bit in itertools.product(range(8, len(data) - 12), range(8)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        with pytest.raises(DecodeError):
            decode_image(flipped)
    assert torch.equal(decode_image(data[:-12]), sound)


@pytest.mark.parametrize("number", range(len(fuzz.seeds("png"))))
def test_a_checked_png_has_the_same_pixels(number):
    data = fuzz.seeds("png")[number]
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(checked_png(data))) as after:
        assert (after.mode, after.size) == (before.mode, before.size)
        assert np.array_equal(np.asarray(after.convert("RGBA")), np.asarray(before.convert("RGBA")))


def adam7(samples: np.ndarray) -> bytes:
    """An interlaced 8-bit grey PNG, its passes cut as the standard's table says."""
    # in the standard's order: first row and column, steps down and across; a pass without a pixel has no row
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts_of = [samples[y::down, x::across] for y, x, down, across in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts_of if part.size for row in part)
    height, width = samples.shape
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 0, 0, 0, 1))
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    blank = [len(body).to_bytes(4, "big") + kind + body + b"\0\0\0\0" for kind, body in parts]
    return bytes(fuzz.with_checksums(bytearray(b"\x89PNG\r\n\x1a\n" + b"".join(blank))))


@pytest.mark.parametrize("size", ((8, 8), (17, 13), (1, 1), (3, 9), (9, 2)))
def test_interlaced_png(size):
    samples = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    assert np.array_equal(decode_image(adam7(samples), in_chans=1)[0].numpy(), samples)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(checked_png(adam7(samples))))), samples)


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (lambda d: d[:-12] + b"\0\0\0\0ABCD" + b"\0\0\0\0" + d[-12:], "unknown critical chunk ABCD"),
        (lambda d: d[:8] + d[33:], "first chunk is not IHDR"),
        (lambda d: d[:20], "no header|truncated"),
        (lambda d: d[:24] + bytes((7, *d[25:])), "header is not valid"),
        (lambda d: d[:28] + bytes((2, *d[29:])), "header is not valid"),
        (lambda d: d[:23] + bytes((d[23] + 1, *d[24:])), "of 833 bytes of pixels"),
        (lambda d: d[:23] + bytes((d[23] - 1, *d[24:])), "more pixels than its header states"),
    ),
)  # fmt: skip
def test_reasons_of_a_png_with_right_checksums(change, reason):
    data = fuzz.with_checksums(bytearray(change(fuzz.seeds("png")[0])))
    with pytest.raises(ValueError, match=reason):
        checked_png(data)
