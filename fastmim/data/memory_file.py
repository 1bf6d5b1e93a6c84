"""Files without a name, and what trainer and worker pass each other in them."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from typing import Any

import torch
from torch import Tensor

from fastmim.data.worker_error import DataWorkerError


def memory_file() -> int:
    """A handle of a new empty file, in memory where the system has that: ``/dev/shm`` does not bound it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastmim-data")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Pickler(pickle.Pickler):
    """Leaves tensors out, to be written behind the rest without a copy."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.contiguous())
        return tuple(obj.shape), str(obj.dtype).removeprefix("torch.")


class _Unpickler(pickle.Unpickler):
    """Reads the tensors back, into memory of their own."""

    def __init__(self, head: bytes, file: int, pin_memory: bool) -> None:
        super().__init__(io.BytesIO(head))
        self._file, self._pos, self._pin = file, len(head), pin_memory

    def persistent_load(self, pid: Any) -> Tensor:
        shape, dtype = pid
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=self._pin)
        view = _bytes_of(tensor)
        while len(view):
            count = os.preadv(self._file, [view], self._pos)
            if not count:
                raise DataWorkerError("a data worker's answer is cut short: memory is full")
            self._pos, view = self._pos + count, view[count:]
        return tensor


def pack(file: int, answer: tuple[str, Any]) -> int:
    """Write an answer; returns the length of what stands before its tensors."""
    head = io.BytesIO()
    pickler = _Pickler(head)
    pickler.dump(answer)
    write(file, [head.getbuffer(), *map(_bytes_of, pickler.tensors)])
    return len(head.getbuffer())


def unpack(file: int, size: int, pin_memory: bool) -> tuple[str, Any]:
    """The answer that :func:`pack` wrote; its tensors have memory of their own, pinned if so asked.

    Raises:
        DataWorkerError: the file is shorter than it should be.
    """
    kind, value = _Unpickler(os.pread(file, size, 0), file, pin_memory).load()
    return kind, value


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(array)


def write(file: int, parts: list[Any]) -> None:
    """The parts, one behind the other, from the start of the file on."""
    pos = 0
    for part in parts:
        view = memoryview(part)
        while len(view):
            count = os.pwrite(file, view, pos)
            pos, view = pos + count, view[count:]
