"""Sharded checkpoints: every rank writes the pieces it holds, and any number of ranks can read them.

A piece is a one-dimensional run of a parameter's fp32 weight or of one of its moments, stored under
``name|slot|start`` (``start`` counts elements of the flattened parameter) in ``shard-00000.safetensors``, one
file per rank. The reader finds pieces by name and position, so neither the number of ranks nor the ZeRO stage
that wrote them matters, and nobody ever holds more than what it asks for. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fastmim.files import naming
from fastmim.wording import plural

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
WEIGHT = "weight"
STEP = "step"
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Piece(NamedTuple):
    """A run of a flattened tensor: ``values`` (n,) lie from element ``start`` on."""

    name: str
    slot: str
    start: int
    values: Tensor


class Entry(NamedTuple):
    """One tensor of a file that is about to be written; ``read`` gives it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file tensor by tensor: one of them in memory at a time, and views as they are.

    (``safetensors.torch.save_file`` wants all of them at once, and refuses views of one buffer.)
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.key] = dict(dtype=_DTYPES[entry.dtype], shape=list(entry.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            flat = entry.read().detach().reshape(-1)
            if flat.dtype != entry.dtype or flat.numel() != math.prod(entry.shape):
                raise RuntimeError(f"{entry.key}: promised {entry.dtype} {entry.shape}, got {flat.dtype} {flat.shape}")
            file.write(flat.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def shard_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"shard-{rank:05d}.safetensors"


def require_file(path: Path) -> Path:
    """``path``, if it is a regular file: opening a pipe or a device would wait, or read, for ever.

    Raises:
        RuntimeError: it is something else, or not there.
    """
    if not path.is_file():
        raise RuntimeError(f"{path.name} is {'not a regular file' if path.exists() else 'missing'}")
    return path


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint consists of shards."""
    return any(folder.glob("shard-*.safetensors"))


def write_shard(folder: Path, rank: int, pieces: Iterable[Piece], shapes: Mapping[str, Sequence[int]]) -> None:
    """Write this rank's pieces; ``shapes`` holds the full shape of every tensor by name."""
    entries = [
        Entry(f"{p.name}|{p.slot}|{p.start}", p.values.dtype, (p.values.numel(),), partial(_values, p)) for p in pieces
    ]
    metadata = {"format": "pt", "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()})}
    write_safetensors(shard_path(folder, rank), entries, metadata)


def _values(piece: Piece) -> Tensor:
    return piece.values


class Shards:
    """Reads a checkpoint by name and range; tensors stay on the disk until they are asked for.

    Args:
        folder: a checkpoint with shards, or with ``model.safetensors`` and ``optimizer.safetensors``.

    Raises:
        OSError, RuntimeError, safetensors.SafetensorError: a file is missing, damaged or of another checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        if is_sharded(folder):
            for path in sorted(folder.glob("shard-*.safetensors")):
                self._add_shard(path)
        else:
            self._add_whole(folder / MODEL_FILE, lambda key: (key, WEIGHT))
            self._add_whole(folder / OPTIMIZER_FILE, lambda key: tuple(key.rsplit("|", 1)))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def _add_shard(self, path: Path) -> None:
        file = safe_open(require_file(path), framework="pt")
        shapes = {name: tuple(shape) for name, shape in json.loads((file.metadata() or {})["shapes"]).items()}
        if self.shapes not in ({}, shapes):
            raise RuntimeError(f"{path.name} holds parts of another model than the shards before it")
        self.shapes = shapes
        for key in file.keys():  # noqa: SIM118
            name, slot, start = key.rsplit("|", 2)
            self._add(name, slot, int(start), file, key)

    def _add_whole(self, path: Path, split: Callable[[str], Any]) -> None:
        file = safe_open(require_file(path), framework="pt")
        for key in file.keys():  # noqa: SIM118
            name, slot = split(key)
            if slot == WEIGHT:
                self.shapes[name] = tuple(file.get_slice(key).get_shape())
            self._add(name, slot, 0, file, key)

    def _add(self, name: str, slot: str, start: int, file: Any, key: str) -> None:
        length = math.prod(file.get_slice(key).get_shape())
        self._pieces.setdefault((name, slot), []).append((start, length, file, key))

    def slots(self, name: str) -> list[str]:
        """What is stored of a parameter: ``weight`` and the optimiser's values."""
        return [slot for key, slot in self._pieces if key == name]

    def names(self) -> list[str]:
        """Of everything that is stored."""
        return list(dict.fromkeys(name for name, _ in self._pieces))

    def runs(self, name: str, slot: str) -> list[tuple[int, int]]:
        """(start, length) of the pieces of a flattened tensor, in order."""
        return [(start, length) for start, length, _, _ in self._pieces.get((name, slot), [])]

    def values(self, name: str, slot: str) -> Iterator[Tensor]:
        """Its pieces, one in memory at a time."""
        for _, _, file, key in self._pieces.get((name, slot), []):
            yield file.get_tensor(key)

    def each(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, slot, values) of every piece, one in memory at a time."""
        for name, slot in self._pieces:
            for values in self.values(name, slot):
                yield name, slot, values

    def scalar(self, name: str, slot: str) -> float:
        """A single number, such as the optimiser's step.

        Raises:
            RuntimeError: not stored.
        """
        pieces = self._pieces.get((name, slot))
        if not pieces:
            raise RuntimeError(f"{name} ({slot}) is missing")
        _, _, file, key = pieces[0]
        return float(file.get_tensor(key).reshape(-1)[0])

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop - 1`` of a flattened tensor.

        Raises:
            RuntimeError: some of them are not in the checkpoint.
        """
        found, position = [], start
        for begin, length, file, key in self._pieces.get((name, slot), []):
            if begin <= position < min(begin + length, stop):
                end = min(begin + length, stop)
                view = file.get_slice(key)
                # Only one-dimensional tensors can be read in part.
                flat = view if len(view.get_shape()) == 1 else file.get_tensor(key).reshape(-1)
                found.append(flat[position - begin : end - begin])
                position = end
        if position < stop:
            raise RuntimeError(f"{name} ({slot}) is missing from element {position} on")
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0), *found])

    def tensor(self, name: str) -> Tensor:
        """The whole weight, in its shape.

        Raises:
            RuntimeError: not stored, or only in part.
        """
        if name not in self.shapes:
            raise RuntimeError(f"{name} is missing")
        count = math.prod(self.shapes[name])
        return self.read(name, WEIGHT, 0, count).reshape(self.shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of the stored weight."""
        return self.read(name, WEIGHT, 0, min(1, math.prod(self.shapes[name]))).dtype

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Names and shapes are exactly those of a model.

        Raises:
            RuntimeError: naming what is missing, left over or of another shape.
        """
        missing, extra = sorted(expected.keys() - self.shapes.keys()), sorted(self.shapes.keys() - expected.keys())
        other = sorted(n for n in expected.keys() & self.shapes.keys() if tuple(expected[n]) != self.shapes[n])
        for what, names in (("missing", missing), ("left over", extra), ("of another shape", other)):
            if names:
                raise RuntimeError(f"{plural(len(names), 'tensor is', 'tensors are')} {what}, for example {names[0]}")
