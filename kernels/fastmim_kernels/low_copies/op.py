"""Low-precision copies of all weights of a model in one launch a step, instead of a cast for each product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.dispatch import resolve
from ..common.rows import exactly

ALIGN = 64
"""Values: every copy starts at a multiple of it."""


def low_copies(tensors: Sequence[Tensor], dtype: torch.dtype, *, impl: str = "auto") -> list[Tensor]:
    """Copies in ``dtype``, for ``low_weight`` of the products; no gradient flows through them.

    The copies are views of one buffer. A tensor that is in ``dtype`` already is returned as it is.

    Args:
        tensors: Contiguous parameters, on one device; of float32 but for those in ``dtype``.
        dtype: Of the copies.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: A tensor is neither.
    """
    wide = [t.detach() for t in tensors if t.dtype != dtype]
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in wide):
        raise ValueError(f"low_copies: tensors must be contiguous float32, got {sorted({str(t.dtype) for t in wide})}")
    if not wide:
        return list(tensors)
    function = resolve("low_copies", impl, _IMPLEMENTATIONS, wide[0].device)
    parts = function(wide, dtype).split([padded(t.numel()) for t in wide])
    rest = iter([exactly(part, t.shape) for part, t in zip(parts, wide, strict=True)])
    return [t if t.dtype == dtype else next(rest) for t in tensors]


def padded(count: int) -> int:
    """Values that a copy of ``count`` takes."""
    return -(-count // ALIGN) * ALIGN


def traffic(values: int, itemsize: int = 2) -> tuple[int, int, int]:
    """Least (bytes read, bytes written, FLOPs)."""
    return 4 * values, itemsize * values, 0


@torch.library.custom_op("fastmim::low_copies", mutates_args=())
def _op(tensors: Sequence[Tensor], dtype: torch.dtype, impl: str) -> Tensor:
    flat = tensors[0].new_empty(sum(padded(t.numel()) for t in tensors), dtype=dtype)
    if impl == "triton":
        from . import on_triton as kernels
        kernels.copy(tensors, flat)
        return flat
    end = 0
    for t in tensors:
        flat[end : end + t.numel()].copy_(t.reshape(-1))
        end += padded(t.numel())
    return flat


@_op.register_fake
def _(tensors: Sequence[Tensor], dtype: torch.dtype, impl: str) -> Tensor:
    return tensors[0].new_empty(sum(padded(t.numel()) for t in tensors), dtype=dtype)


@register_flop_formula(torch.ops.fastmim.low_copies)
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


_IMPLEMENTATIONS = {impl: (lambda tensors, dtype, impl=impl: _op(tensors, dtype, impl)) for impl in ("torch", "triton")}
_IMPLEMENTATIONS["reference"] = _IMPLEMENTATIONS["torch"]
