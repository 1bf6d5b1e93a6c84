"""Other orders of programs, and guards around memory, for any test that runs kernels in the interpreter.

Both replace a part of the interpreter until ``monkeypatch`` undoes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Builder, Launch = interpreter.InterpreterBuilder, interpreter.GridExecutor
GUARD = 1 << 16
"""Bytes before and behind each argument: more than a tile of the examples reaches."""


def visit(monkeypatch: pytest.MonkeyPatch, order: str, seed: int = 0) -> None:
    """Programs of every launch run in ``order``: "reversed" or "random" (the same one every time)."""
    plain, permutations = Builder.set_grid_idx, {}

    def permutation(grid: tuple[int, int, int]) -> np.ndarray:
        if grid not in permutations:
            count = int(np.prod(grid))
            random = np.random.default_rng((seed, *grid)).permutation(count)
            permutations[grid] = random if order == "random" else np.arange(count)[::-1]
        return permutations[grid]

    def set_grid_idx(self: Builder, *place: int) -> None:
        grid = tuple(self.grid_dim)
        other = permutation(grid)[np.ravel_multi_index(place, grid)]
        plain(self, *map(int, np.unravel_index(other, grid)))

    monkeypatch.setattr(Builder, "set_grid_idx", set_grid_idx)


class Guards:
    """What one launch may touch: the memory of its tensors, moved to where nothing else is.

    Args:
        name: Of the kernel, for messages.
        tensors: Its arguments.
        more: (address, bytes) of memory that it finds without an argument.
    """

    def __init__(self, name: str, tensors: list[Tensor], more: list[tuple[int, int]]) -> None:
        self.name, self.blocks, self.moved = name, [], {}
        for first, end in _merged([_extent(t) for t in tensors if t.numel()]):
            # All ones: NaN as a float of any size, −1 as an integer.
            memory = torch.full((2 * GUARD + end - first + 64,), 0xFF, dtype=torch.uint8)
            # A block starts as far from a multiple of 64 bytes as the tensor did.
            start = GUARD + (first - memory.data_ptr() - GUARD) % 64
            self.blocks.append((first, end, memory, start))
        spans = [(m.data_ptr() + start, end - first) for first, end, m, start in self.blocks] + more
        self.starts = np.array(sorted(first for first, _ in spans), dtype=np.int64)
        self.ends = np.array([first + size for first, size in sorted(spans)], dtype=np.int64)
        for tensor in tensors:
            self.moved[id(tensor)] = self._move(tensor)

    def _move(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        low, high = _extent(tensor)
        first, _, memory, start = next(b for b in self.blocks if b[0] <= low and high <= b[1])
        place = start + low - first
        flat = memory[place : place + high - low].view(tensor.dtype)
        # What lies between the values of a strided tensor is nobody's.
        moved = flat.as_strided(tensor.shape, tensor.stride())
        _once(moved).copy_(_once(tensor))
        return moved

    def finish(self, tensors: list[Tensor]) -> None:
        """Check the guards, and bring back what the kernel wrote."""
        for first, end, memory, start in self.blocks:
            around = torch.cat([memory[:start], memory[start + end - first :]])
            assert (around == 0xFF).all(), f"{self.name} wrote beyond a tensor"
        for tensor in tensors:
            if tensor.numel():
                _once(tensor.detach()).copy_(_once(self.moved[id(tensor)]))

    def check(self, pointers: interpreter.TensorHandle, mask: Any, what: str) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        chosen = np.asarray(pointers.data).astype(np.int64)
        if mask is not None:
            # A mask that was made with a scalar holds 0 and 1, which would be places.
            chosen = chosen[np.broadcast_to(mask.data, chosen.shape).astype(bool)]
        place = np.searchsorted(self.starts, chosen, side="right") - 1
        good = (place >= 0) & (chosen + size <= self.ends[np.maximum(place, 0)])
        assert good.all(), f"{self.name} {what} outside of its tensors"


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the first one behind."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _once(tensor: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor."""
    return tensor[tuple(slice(0, 1 if s == 0 else None) for s in tensor.stride())]


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that overlap as one, so that two views of one memory stay views of one memory."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(extents):
        if found and first < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


def _beyond_arguments(name: str, arguments: list[Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of memory that a kernel has the addresses of in a tensor."""
    if name != "copy_kernel":
        return []
    return [(address, 4 * count) for address, _, count in arguments[0].tolist()]


def guard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch sees its tensors with guards around: nothing outside is read or written. → kernels that ran.

    Also what would not be seen on a CPU: a grid of more than 65,535 along y or z.
    """
    launch, ran, current = Launch.__call__, [], []

    def guarded(self: Launch, *args: object, **kwargs: object) -> None:
        tensors = list({id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}.values())
        guards = Guards(self.fn.__name__, tensors, _beyond_arguments(self.fn.__name__, tensors))
        assert all(n <= 65535 for n in tuple(self.grid)[1:]), f"{guards.name}: grid {self.grid}"
        ran.append(guards.name)
        current.append(guards)
        try:
            moved_args, moved_kwargs = tree_map_only(Tensor, lambda t: guards.moved[id(t)], (args, kwargs))
            launch(self, *moved_args, **moved_kwargs)
        finally:
            current.pop()
        guards.finish(tensors)

    def checked(method: str, what: str, at: int, mask_at: int) -> None:
        plain = getattr(Builder, method)

        def run(self: Builder, *args: Any) -> Any:
            current[-1].check(args[at], args[mask_at], what)
            return plain(self, *args)

        monkeypatch.setattr(Builder, method, run)

    monkeypatch.setattr(Launch, "__call__", guarded)
    checked("create_masked_load", "reads", 0, 1)
    checked("create_masked_store", "writes", 0, 2)
    checked("create_atomic_rmw", "counts", 1, 3)
    return ran
