"""Low-precision copies of all weights of a model in one launch a step, instead of a cast for each product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import FLOATING, explained, wrong
from ..common.define_op import define_op
from . import on_torch
from .layout import total, views


@explained()
def low_copies(tensors: Sequence[Tensor], dtype: torch.dtype, *, impl: str = "auto") -> list[Tensor]:
    """Copies in ``dtype``, for ``low_weight`` of the products; no gradient flows through them.

    The copies are views of one buffer. A tensor that is in ``dtype`` already is returned as it is.

    Args:
        tensors: Contiguous parameters, on one device; of float32 but for those in ``dtype``.
        dtype: Of the copies.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: An argument is not what is said here.
    """
    if dtype not in FLOATING:
        raise wrong("low_copies", "dtype", "float16, bfloat16, float32 or float64", dtype)
    if isinstance(tensors, Tensor):  # which is a sequence of its rows
        raise wrong("low_copies", "tensors", "a sequence of tensors", tensors)
    wide = [t for t in tensors if t.dtype is not dtype]
    if others := [t for t in wide if t.dtype is not torch.float32 or not t.is_contiguous()]:
        takes = f"contiguous, of float32 or {str(dtype).removeprefix('torch.')}"
        raise wrong("low_copies", "tensors", takes, others[0])
    if not wide:
        return list(tensors)
    copies = views(OP(wide, dtype, impl=impl), wide)
    if len(wide) == len(tensors):
        return copies
    rest = iter(copies)
    return [t if t.dtype is dtype else next(rest) for t in tensors]


def traffic(values: int, itemsize: int = 2) -> tuple[int, int, int]:
    """Least (bytes read, bytes written, FLOPs)."""
    return 4 * values, itemsize * values, 0


def _fake(tensors: Sequence[Tensor], dtype: torch.dtype, impl: str) -> Tensor:
    return tensors[0].new_empty(total(tensors), dtype=dtype)


def _moved(args: Sequence[Any], share: float) -> tuple[int, int]:
    tensors, dtype, _ = args
    read, written, _ = traffic(sum(t.numel() for t in tensors), dtype.itemsize)
    return read, written


OP = define_op("low_copies", on_torch, ".on_triton", reference=on_torch.forward, fake=_fake, moved=_moved)
