"""Which storages are alive when: the memory of a step, op by op, on fake or real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor


class LiveBytes:
    """Births and deaths of storages on a clock that ticks once an op.

    Args:
        known: Tensors whose storages are not counted, such as weights and inputs.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {t.untyped_storage()._cdata for t in known}
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._alive: dict[int, int] = {}
        self._lives: list[list[int]] = []
        self.transients: list[int] = []

    def tick(self, made: Iterable[Tensor], transient: int = 0) -> int:
        """An op has run: ``made`` are its outputs, ``transient`` what it held beyond them. Returns bytes born."""
        now, born = len(self.transients), 0
        self.transients.append(transient)
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in self._alive:
                continue
            self._alive[key] = len(self._lives)
            self._lives.append([now, -1, storage.nbytes()])
            born += storage.nbytes()
            self._refs[key] = weakref.ref(storage, lambda _, key=key: self._die(key))  # type: ignore[misc]
        return born

    def _die(self, key: int) -> None:
        del self._refs[key]
        self._lives[self._alive.pop(key)][1] = len(self.transients)

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(self._lives[i][2] for i in self._alive.values())

    def history(self, chosen: Iterable[Tensor] = ()) -> tuple[list[int], list[int]]:
        """At each tick (bytes alive and transient without the storages of ``chosen``, bytes of those)."""
        picked = {self._alive[key] for t in chosen if (key := t.untyped_storage()._cdata) in self._alive}
        changes = [[0] * (len(self.transients) + 1) for _ in range(2)]
        for i, (birth, death, size) in enumerate(self._lives):
            changes[i in picked][birth] += size
            changes[i in picked][death] -= size if death >= 0 else 0
        others, those = (list(accumulate(change[:-1])) for change in changes)
        return [alive + extra for alive, extra in zip(others, self.transients, strict=True)], those

    def peak(self) -> int:
        """Most bytes alive at any tick."""
        return max(self.history()[0], default=0)
