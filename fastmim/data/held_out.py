"""A share of the images held out for validation, by a hash of each name.

Which side an image is on depends on its name alone: not on the others, so that it stays there when files are added,
nor on the seed, the rank or the loader. Two copies of an image under two names may be on two sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fastmim.data.index import ImageIndex
from fastmim.data.several import SeveralIndex
from fastmim.wording import plural

_WORD = 8


class PartIndex:
    """Some images of another index, in its order.

    Args:
        whole: the index.
        numbers: int64, rising: those of its images that this one has.
    """

    def __init__(self, whole: ImageIndex, numbers: np.ndarray) -> None:
        self.whole, self.numbers, self.root = whole, numbers, whole.root

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> bytes:
        """The name of image `index` below its root, as bytes."""
        return self.whole.name(int(self.numbers[index]))

    def label(self, index: int) -> str:
        """The name of image `index`, safe to print and to write as UTF-8."""
        return self.whole.label(int(self.numbers[index]))

    def read(self, index: int) -> bytearray:
        """The encoded bytes of image `index`; DecodeError when they cannot be read."""
        return self.whole.read(int(self.numbers[index]))

    @property
    def fingerprint(self) -> str:
        """Hex digest of that of the whole and of which images these are."""
        return hashlib.sha256(self.whole.fingerprint.encode() + self.numbers.tobytes()).hexdigest()


def places(index: ImageIndex) -> np.ndarray:
    """float64 in [0, 1) for every image, a function of its name alone: below `fraction` it is held out."""
    digests = (hashlib.blake2b(index.name(i), digest_size=_WORD).digest() for i in range(len(index)))
    return np.frombuffer(b"".join(digests), dtype=">u8") / 2.0 ** (8 * _WORD)


def split(index: ImageIndex, fraction: float, *, held_out: bool) -> ImageIndex:
    """The images that are held out, or the others; several folders stay apart.

    Raises:
        ValueError: there are none on this side.
    """
    if isinstance(index, SeveralIndex):
        parts: Sequence[ImageIndex] = [_side(part, fraction, held_out) for part in index.parts]
        part: ImageIndex = SeveralIndex([one for one in parts if len(one)] if held_out else parts)
    else:
        parts = [part := _side(index, fraction, held_out)]
    if not len(part) or (not held_out and not all(map(len, parts))):
        what, fix = ("holds out none", "larger") if held_out else ("leaves none to train on", "smaller")
        raise ValueError(
            f"data.val_fraction={fraction:g}: {what} of the {plural(len(index), 'image')}, whose names decide; give"
            f" a {fix} one, or null"
        )
    return part


def _side(index: ImageIndex, fraction: float, held_out: bool) -> PartIndex:
    return PartIndex(index, np.flatnonzero((places(index) < fraction) == held_out))
