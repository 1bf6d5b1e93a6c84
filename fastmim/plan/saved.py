"""What autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sites import caller, short


class SavedTensors:
    """Bytes that autograd keeps between forward and backward: unique storages that are not parameters.

    Args:
        parameters: Tensors whose storages are left out.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._known = {t.untyped_storage()._cdata for t in parameters}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._shapes: dict[int, str] = {}

    def __enter__(self) -> SavedTensors:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            # The storage is held, so that its address is not given to another one.
            self._storages[storage._cdata] = storage
            self._shapes.setdefault(storage._cdata, f"{short(tensor)} {caller()}")
        return tensor

    @property
    def bytes(self) -> int:
        return sum(s.nbytes() for s in self._storages.values())

    def by_site(self) -> dict[str, int]:
        """Bytes by shape and source line of the first op that saved a storage."""
        found: dict[str, int] = {}
        for key, storage in self._storages.items():
            found[self._shapes[key]] = found.get(self._shapes[key], 0) + storage.nbytes()
        return found
