"""Clusters of colours out of a file, which ``fastmim data clusters`` makes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

CENTRES = "centres"
"""The tensor of a file: (K, C) float32 colours in [0, 1]."""


class ColourClusters(NamedTuple):
    """Centres (K, C) in [0, 1] float32 on the CPU, and a digest of them."""

    centres: Tensor
    digest: str


def read_clusters(path: str | Path, in_chans: int) -> ColourClusters:
    """The clusters of a file.

    Args:
        path: A safetensors file with a tensor :data:`CENTRES`.
        in_chans: Channels of the images.

    Raises:
        ValueError: There is none, or it holds something else: ``PATH: what; fix`` in one line.
    """
    path = Path(path).expanduser()
    make = "make one with `fastmim data clusters IMAGES --out FILE`"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {make}")
    try:
        with safe_open(path, framework="np") as file:
            found = file.get_tensor(CENTRES)
    except Exception as error:  # safetensors raises its own type for a broken file
        raise ValueError(f"{path}: no file of colour clusters ({str(error)[:200]}); {make}") from None
    if found.ndim != 2 or len(found) < 2 or not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
        raise ValueError(f"{path}: {CENTRES} must be two colours or more in [0, 1], (K, C); {make}")
    if found.shape[1] != in_chans:
        colours = f"colours of {found.shape[1]} channel{'s' * (found.shape[1] != 1)}"
        raise ValueError(
            f"{path}: {colours}, and model.in_chans={in_chans}; {make} and "
            f"model.in_chans={in_chans}"
        )
    centres = np.ascontiguousarray(found, dtype=np.float32)
    return ColourClusters(torch.tensor(centres, device="cpu"), hashlib.sha256(centres.tobytes()).hexdigest())
