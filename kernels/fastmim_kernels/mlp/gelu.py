"""Exact (erf) GELU with the bias of the linear layer before it (Hendrycks and Gimpel, 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import reference
from ..common.arguments import explained, floating, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import statistics_dtype
from . import gelu_on_torch


@explained()
def gelu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """``z·Φ(z)`` with ``z = x + bias``, in the dtype of x and computed in float32 at least.

    Only x is kept for backward, not z; d bias comes out of the same pass as d x.

    Args:
        x: (…, N) floating point.
        bias: (N,), or None for 0.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: An argument is not what is said here.
    """
    floating("gelu", x, bias)
    if not x.ndim:
        raise wrong("gelu", "x", "(…, N)", x)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise wrong("gelu", "bias", f"{tuple(x.shape[-1:])} for x of {tuple(x.shape)}", bias)
    return OP(x, bias, impl=impl)


def traffic(rows: int, columns: int, *, itemsize: int = 2, param_itemsize: int = 4, bias: bool = True
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Args:
        rows, columns: Of x.
        itemsize, param_itemsize: Bytes of a value of x, of the bias.
        bias: Given.
    """
    n, parameter = rows * columns * itemsize, columns * param_itemsize * bias
    return (n + parameter, n, 0), (2 * n + parameter, n + 4 * columns * bias, 0)


def _fake(x: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """(d x, d bias, empty where there is no bias)."""
    d_bias = x.new_empty((0,) if bias is None else bias.shape, dtype=statistics_dtype(x.dtype))
    return x.new_empty(x.shape), d_bias


def _save(inputs: Any, outputs: Any) -> Any:
    x, bias, impl = inputs
    return (x, bias), (impl,)


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = kept.tensors
    dx, d_bias = backward(grad, x, bias, *kept.settings)
    return dx, None if bias is None else d_bias.to(bias.dtype)


def _reference(x: Tensor, bias: Tensor | None) -> Tensor:
    return reference.gelu(x, bias).to(x.dtype)


OP = define_op("gelu", gelu_on_torch, ".gelu_on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients)
