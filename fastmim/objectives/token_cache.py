"""Codes of crops that a tokenizer has already seen, on disk: a crop is known by its pixels.

So its image, box, flip and colours are all in the key, and nothing has to say which run, seed or policy made it. It
helps where crops come back: with one crop an image (no random box, flip or jitter) from the second epoch on, with
random ones in another run of the same seed.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .keys import random_keys

KEY_BYTES = 16


class TokenCache:
    """Records of a key and the codes of a crop, in one file a process; those of all earlier ones are read.

    Args:
        folder: Made if need be; several runs and ranks may share it.
        digest: Of the tokenizer: others have files of their own.
        tokens: Codes of a crop.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, folder: str | Path, digest: str, tokens: int) -> None:
        self.folder, self.tokens = Path(folder).expanduser(), tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record = np.dtype([("key", f"V{KEY_BYTES}"), ("codes", "<u2", (tokens,))])
        name = f"{digest[:16]}-{tokens}"
        self._own = self.folder / f"{name}-{uuid.uuid4().hex[:12]}.codes"
        self._places: dict[bytes, tuple[Path, int]] = {}
        self.hits = self.misses = 0
        for path in sorted(self.folder.glob(f"{name}-*.codes")):
            # A record that a kill has cut off is the last one, and is left out.
            whole = path.stat().st_size // self._record.itemsize
            if whole:
                keys = np.memmap(path, self._record, "r", shape=(whole,))["key"]
                self._places |= {bytes(key): (path, row) for row, key in enumerate(keys)}

    def look_up(self, keys: list[bytes]) -> tuple[Tensor, list[int]]:
        """(B, tokens) int64 codes on the CPU, and the numbers of the rows that are not known."""
        found = torch.zeros(len(keys), self.tokens, dtype=torch.int64)
        unknown = []
        for i, key in enumerate(keys):
            if key not in self._places:
                unknown.append(i)
                continue
            path, row = self._places[key]
            record = np.fromfile(path, self._record, count=1, offset=row * self._record.itemsize)
            found[i] = torch.from_numpy(record["codes"][0].astype(np.int64))
        self.hits, self.misses = self.hits + len(keys) - len(unknown), self.misses + len(unknown)
        return found, unknown

    def add(self, keys: list[bytes], codes: Tensor) -> None:
        """Append the (B, tokens) codes of these crops.

        Raises:
            OSError: They cannot be written.
        """
        records = np.zeros(len(keys), self._record)
        records["key"] = [np.void(key) for key in keys]
        records["codes"] = codes.cpu().numpy().astype(np.uint16)
        with self._own.open("ab") as file:
            first = file.tell() // self._record.itemsize
            file.write(records.tobytes())
        self._places |= {key: (self._own, first + i) for i, key in enumerate(keys)}


def crop_digests(crops: Tensor) -> list[bytes]:
    """128 bits of each of (B, C, h, w) uint8 crops, from integer products on their device.

    Two sums of pixels times fixed random odd numbers, modulo 2⁶⁴: other pixels give the same by chance alone.
    """
    flat = crops.flatten(1).long()
    factors = random_keys(torch.arange(flat.shape[1], device=crops.device), 2, seed=0, epoch=0) | 1
    sums = torch.stack([(flat * column).sum(1) for column in factors.unbind(1)], 1)
    return [row.tobytes() for row in sums.cpu().numpy()]
