"""Exact (erf) GELU with the bias of the linear layer before it (Hendrycks and Gimpel, 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast, shortcut, shortcut_with_grad
from ..common.dispatch import resolve
from ..common.rows import column_sum, refuse_float64, statistics_dtype


def gelu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """``z·Φ(z)`` with ``z = x + bias``, in the dtype of x and computed in float32 at least.

    Only x is kept for backward, not z; d bias comes out of the same pass as d x.

    Args:
        x: (…, N) floating point.
        bias: (N,), or None for 0.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: ``bias`` is not (N,).
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu: bias must be {tuple(x.shape[-1:])}, got {tuple(bias.shape)}")
    function = resolve("gelu", impl, _IMPLEMENTATIONS, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, bias)


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


def _forward(x: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    x = x.contiguous()
    if impl == "triton":
        from . import gelu_on_triton as kernels
        refuse_float64("gelu", x)
        return kernels.forward(x, bias)
    return F.gelu(x) if bias is None else torch.ops.aten.gelu_(x + bias.to(x.dtype))


_op = torch.library.custom_op("fastmim::gelu", _forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """(d x, d bias, empty where there is no bias)."""
    grad, x = grad.contiguous(), x.contiguous()
    if impl == "triton":
        from . import gelu_on_triton as kernels
        return kernels.backward(grad, x, bias)
    z = x if bias is None else x + bias.to(x.dtype)
    dx = torch.ops.aten.gelu_backward(grad, z)
    wide = statistics_dtype(x.dtype)
    return dx, x.new_empty(0, dtype=wide) if bias is None else column_sum(dx).to(wide)


_backward_op = torch.library.custom_op("fastmim::gelu_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    d_bias = x.new_empty((0,) if bias is None else bias.shape, dtype=statistics_dtype(x.dtype))
    return x.new_empty(x.shape), d_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bias, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


@outside_autocast
def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    x, bias = ctx.saved_tensors
    dx, d_bias = _run_backward(grad, x, bias, ctx.impl)
    return dx, None if bias is None else d_bias.to(bias.dtype), None


torch.library.register_autograd("fastmim::gelu", _autograd, setup_context=_setup_context)
_run_op = shortcut_with_grad(_op, _forward, _setup_context, _autograd)
_run_backward = shortcut(_backward_op, _backward)


# No matrix product inside; torch's counter counts nothing else either.
@register_flop_formula([torch.ops.fastmim.gelu, torch.ops.fastmim.gelu_backward])
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def _reference(x: Tensor, bias: Tensor | None) -> Tensor:
    return reference.gelu(x, bias).to(x.dtype)


_IMPLEMENTATIONS: dict[str, Callable] = {
    "torch": lambda x, bias: _run_op(x, bias, "torch"), "triton": lambda x, bias: _run_op(x, bias, "triton"),
    "reference": _reference}
