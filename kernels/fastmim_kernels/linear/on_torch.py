"""The products of a linear layer in torch.

On a CPU with AVX-512 they are oneDNN's, called without the detour through ``addmm``, which fills the result with the
bias first, and in float32 without MKL, which is up to a third slower there (on Zen 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.cpu import has_amx, onednn_multiplies
from ..common.rows import cast, column_sum, nothing, statistics_dtype

CAST = 1 << 20
"""Values of a weight's gradient that a CPU multiplies before they are cast: 2 MiB, which are there again for the next
ones, where a whole gradient's pages have to be given anew by the system, at up to a third of the product's time."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None
            ) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::linear``."""
    low, own = in_dtype_of(x, weight, low_weight)
    return product(x, low, bias if low_bias is None else low_bias), own


def backward(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, need_x: bool, weight_dtype: torch.dtype,
             add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::linear_backward``."""
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    dx = input_gradient(grad, weight, add).view(x.shape) if need_x else nothing(x)
    return dx, *parameter_gradients(grad, x.reshape(-1, x.shape[-1]), weight_dtype, has_bias)


def in_dtype_of(x: Tensor, weight: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the weight in the dtype of x, the same where it had to be cast for it, else an empty tensor)."""
    if low is not None:
        return low, nothing(x)
    return (weight, nothing(x)) if weight.dtype == x.dtype else (own := weight.to(x.dtype), own)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + b`` of (…, K), (N, K) and (N,) on whatever device; all cast to the dtype of x. No autograd."""
    bias = None if bias is None else cast(bias, x.dtype)
    if _is_onednn(x):
        # It reads a bias as if it were contiguous, whatever its strides.
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    """``grad·W`` of (M, N) and (N, K), plus ``add`` (…, K) of as many values where there is one."""
    if _is_onednn(grad):
        # The weight as it is: in bfloat16 up to 7 % faster; in float32 it would be MKL's.
        d_x = grad @ weight if grad.dtype == torch.bfloat16 else product(grad, weight.t(), None)
        return d_x if add is None else d_x.add_(add.reshape(d_x.shape))
    if add is None:
        return product(grad, weight.t(), None)
    return torch.addmm(add.reshape(-1, add.shape[-1]), grad, weight)


def parameter_gradients(grad: Tensor, x: Tensor, dtype: torch.dtype, has_bias: bool) -> tuple[Tensor, Tensor]:
    """(``gradᵀ·x`` in ``dtype``, sum of the rows of grad in float32 at least, or empty) of (M, N) and (M, K)."""
    wide = statistics_dtype(x.dtype)
    d_bias = column_sum(grad).to(wide) if has_bias else nothing(x, wide)
    return weight_gradient(grad, x, dtype), d_bias


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradᵀ·x`` of (M, N) and (M, K) in ``dtype``."""
    if grad.is_cuda and dtype == torch.float32 != grad.dtype:
        # cuBLAS writes its float32 sums as they are, without a rounding and a cast.
        return torch.mm(grad.t(), x, out_dtype=dtype)
    rows, outputs = grad.shape
    if grad.dtype == torch.float32 and (rows <= 256 or (rows <= 4096 and outputs < x.shape[1])) and _is_onednn(grad):
        # MKL is the faster one of the two with more rows, and where the gradient is the wider operand.
        return product(grad.t(), x.t(), None).to(dtype)
    transposed = grad.t()
    # AMX wants its left operand in rows; a copy of few rows or short ones costs less than what the product gains.
    if (rows <= 256 or outputs <= 512) and grad.dtype == torch.bfloat16 and _is_onednn(grad) and has_amx():
        transposed = transposed.contiguous()
    if grad.dtype == dtype or not grad.is_cpu or outputs * x.shape[1] <= CAST:
        return (transposed @ x).to(dtype)
    d_weight = x.new_empty(outputs, x.shape[1], dtype=dtype)
    for rows_of_weight, out in zip(*(t.split(max(1, CAST // x.shape[1])) for t in (transposed, d_weight)), strict=True):
        out.copy_(rows_of_weight @ x)
    return d_weight


def _is_onednn(x: Tensor) -> bool:
    return x.is_cpu and onednn_multiplies(x.dtype)
