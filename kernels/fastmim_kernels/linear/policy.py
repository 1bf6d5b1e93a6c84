"""Whether a product with more work in its pass is one of Triton's, or cuBLAS' with that work in a pass behind it.

One pass saves bytes and launches, cuBLAS reaches more of the tensor cores. Where a product waits for memory (narrow
maps) the first wins, as the roofs and efficiencies of :mod:`..common.roofs` tell. Where it computes (wide maps) the
second may win, and by how much depends on the GPU and on versions: there the GPU is asked once for each size, see
:mod:`..common.tune`, and one pass is made where it cannot be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from ..common.device import sm_of
from ..common.matmul import precision
from ..common.roofs import HONEST, LAUNCH, roofs_of
from ..common.tune import Ways, choose

R = TypeVar("R")
FUSED, WIDE, APART = "fused", "wide", "apart"
"""One pass with tiles of which two fit on a multiprocessor; with tiles of 128 × 256; two passes."""
_PASSES = {
    # Maps of (rows, columns) that the work beside the product reads and writes, in one pass and in one of its own.
    "linear_gelu": (2, 3), "gelu_gradient": (3, 5), "product_add": (2, 4),
}


def make(kernel: str, rows: int, columns: int, depth: int, like: Tensor, fused: Callable[..., R], apart: Callable[[], R]
         ) -> R:
    """The result by the way that :func:`way` names, of operands in the dtype and on the device of ``like``.

    Args:
        fused: Makes it in one pass; where the kernel has wide tiles, with those that it is given.
        apart: Makes it in two.
    """
    def ways() -> dict[str, Callable[[], R]]:
        wide = wide_tiles(columns, like.dtype, sm_of(like.device)) if kernel in _PASSES else None
        return {FUSED: fused, APART: apart} | ({} if wide is None else {WIDE: partial(fused, wide)})

    taken = way(kernel, rows, columns, depth, like.dtype, like.device, ways)
    return fused() if taken == FUSED else ways()[taken]()


def way(kernel: str, rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device, ways: Ways) -> str:
    """How to make (rows, columns) from (rows, depth): :data:`FUSED`, :data:`WIDE` or :data:`APART`.

    Args:
        kernel: "linear_gelu", "gelu_gradient" or "product_add"; or "weight_gradient": (columns, depth) from rows.
        rows, columns, depth: Of the product.
        dtype: Of its operands.
        device: Where they are; it is current.
        ways: Makes the functions to measure.
    """
    if device.type != "cuda" or one_pass_wins(kernel, rows, columns, depth, dtype, sm_of(device)):
        return FUSED
    # Float32 with TF32 is another task than without. Whether there is a bias or a kept input is not told apart: a
    # recomputed product must have the bits of the first.
    exactness = () if dtype != torch.float32 else (precision(dtype),)
    return choose((kernel, rows, columns, depth, dtype, *exactness), device, ways, FUSED)


def wide_tiles(columns: int, dtype: torch.dtype, sm: int) -> dict[str, int] | None:
    """Tiles of :data:`WIDE`, which hold a multiprocessor alone; None where they would be empty in part, or spill."""
    if sm != 90 or dtype.itemsize != 2 or columns % 256:
        return None
    return {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}


@lru_cache(maxsize=1024)
def one_pass_wins(kernel: str, rows: int, columns: int, depth: int, dtype: torch.dtype, sm: int) -> bool:
    """Whether one pass is faster by the roofs of the product, with the bytes of the pass behind it and its launch."""
    roofs, size = roofs_of(sm), dtype.itemsize
    flops = 2.0 * rows * columns * depth / roofs.flops(dtype)
    bandwidth = roofs.bandwidth * HONEST.memory
    if kernel == "weight_gradient":
        operands, out = rows * (columns + depth) * size + 4 * columns * depth, 0
        together, behind = 0, rows * columns * size
    else:
        operands, out = (rows + columns) * depth * size, rows * columns * size
        one, apart = _PASSES[kernel]
        together, behind = one * out, (apart - 1) * out
    fused = max((operands + together) / bandwidth, flops / HONEST.triton)
    product = max((operands + out) / bandwidth, flops / HONEST.cublas)
    return fused <= product + behind / bandwidth + LAUNCH
