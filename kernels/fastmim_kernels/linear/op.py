"""Linear layer: matrix products laid out for a CPU, and on a GPU the bias gradient within the weight gradient's.

On a CPU the products are oneDNN's, called without the detour through ``addmm``, which fills the result with the
bias first, and in float32 without MKL, which is up to a third slower (on Zen 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.cpu import has_amx, onednn_multiplies
from ..common.define_op import outside_autocast, shortcut, shortcut_with_grad
from ..common.dispatch import resolve
from ..common.rows import column_sum, refuse_float64, statistics_dtype
from ..common.two_readers import and_input


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, low_weight: Tensor | None = None,
           low_bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """``x·Wᵀ + b`` in autocast's dtype where it is on, else in the dtype of x.

    Args:
        x: (…, K) floating point.
        weight: (N, K), cast to that dtype once for forward and backward.
        bias: (N,) or None.
        low_weight, low_bias: The two in the dtype of the computation already, where the caller has cast all
            parameters of a step at once. Gradients go to ``weight`` and ``bias`` only.
        impl: See :mod:`fastmim_kernels.common.dispatch`. "triton": the products that need no fusion are cuBLAS's; the
            gradient of the weight comes with that of the bias out of one kernel.

    Returns:
        (…, N). Gradients of weight and bias come in their own dtypes.

    Raises:
        ValueError: Shapes do not belong together.
    """
    return _call(_IMPLEMENTATIONS, x, weight, bias, low_weight, low_bias, impl)


def linear_and_input(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, low_weight: Tensor | None = None,
                     low_bias: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(:func:`linear`, x), the second for another reader of x: one product then adds both gradients up."""
    if x.dtype != product_dtype(x):
        return linear(x, weight, bias, low_weight=low_weight, low_bias=low_bias, impl=impl), x
    return _call(_AND_INPUT, x, weight, bias, low_weight, low_bias, impl)


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of x; float64 stays."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def _call(implementations: dict[str, Callable], x: Tensor, weight: Tensor, bias: Tensor | None,
          low_weight: Tensor | None, low_bias: Tensor | None, impl: str) -> Any:
    _check(x, weight, bias, low_weight, low_bias)
    function = resolve("linear", impl, implementations, x.device)
    x = x.to(product_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        return function(x, weight, bias, fitting(low_weight, x.dtype), fitting(low_bias, x.dtype))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"linear: weight must be (N, {x.shape[-1]}) and bias (N,), got {tuple(weight.shape)} and "
                         f"{None if bias is None else tuple(bias.shape)}")
    check_low("linear", {"low_weight": (low_weight, weight), "low_bias": (low_bias, bias)})


def check_low(op: str, pairs: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    """Raise ``ValueError`` unless each (copy, parameter) has one shape, where there is a copy."""
    for name, (low, parameter) in pairs.items():
        if low is not None and (parameter is None or low.shape != parameter.shape):
            raise ValueError(f"{op}: {name} must have the shape of its parameter, got {tuple(low.shape)} and "
                             f"{None if parameter is None else tuple(parameter.shape)}")


def fitting(low: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``low`` cut off from autograd; None when it is not in ``dtype`` and therefore of no use."""
    return None if low is None or low.dtype != dtype else low.detach()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + b`` of (M, K), (N, K) and (N,) on whatever device; all cast to the dtype of x. No autograd."""
    bias = None if bias is None else bias.to(x.dtype)
    if _is_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor, add: Tensor | None, impl: str) -> Tensor:
    """``grad·W`` of (M, N) and (N, K), plus ``add`` (…, K) of as many values where there is one."""
    if add is None:
        return product(grad, weight.t(), None)
    add = add.reshape(-1, add.shape[-1])
    if impl == "triton":
        from . import product_add as kernels
        return kernels.product_add(grad, weight, add)
    return product(grad, weight.t(), None).add_(add) if _is_onednn(grad) else torch.addmm(add, grad, weight)


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
    return (transposed @ x).to(dtype)


def _is_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and onednn_multiplies(x.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None,
             impl: str) -> tuple[Tensor, Tensor]:
    """(result, W in the dtype of x, empty when that is its own or given)."""
    if impl == "triton":
        refuse_float64("linear", x)
    low = weight.to(x.dtype) if low_weight is None else low_weight
    out = product(x.reshape(-1, x.shape[-1]), low, bias if low_bias is None else low_bias).view(*x.shape[:-1], -1)
    return out, x.new_empty(0) if low is weight or low is low_weight else low


_op = torch.library.custom_op("fastmim::linear", _forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None,
      impl: str) -> tuple[Tensor, Tensor]:
    cast = weight.dtype != x.dtype and low_weight is None
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(weight.shape if cast else (0,))


def _backward(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, need_x: bool, weight_dtype: torch.dtype,
              impl: str, add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(d x + ``add``, d W in ``weight_dtype``, d b); empty where not wanted."""
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    dx = input_gradient(grad, weight, add, impl).view(x.shape) if need_x else x.new_empty(0)
    return dx, *parameter_gradients(grad, x.reshape(-1, x.shape[-1]), weight_dtype, has_bias, impl)


_backward_op = torch.library.custom_op("fastmim::linear_backward", _backward, mutates_args=())


def parameter_gradients(grad: Tensor, x: Tensor, dtype: torch.dtype, has_bias: bool, impl: str
                        ) -> tuple[Tensor, Tensor]:
    """(``gradᵀ·x`` in ``dtype``, sum of the rows of grad in float32 at least, or empty) of (M, N) and (M, K)."""
    if has_bias and impl == "triton":
        from . import weight_gradient as kernels
        return kernels.weight_gradient(grad, x.contiguous(), dtype)
    wide = statistics_dtype(x.dtype)
    d_bias = column_sum(grad).to(wide) if has_bias else x.new_empty(0, dtype=wide)
    return weight_gradient(grad, x, dtype), d_bias


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, need_x: bool, weight_dtype: torch.dtype, impl: str,
      add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape, dtype=weight_dtype),
            x.new_empty(weight.shape[0] if has_bias else 0, dtype=statistics_dtype(x.dtype)))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, low_weight, _, impl = inputs
    _, low = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(low)
    ctx.save_for_backward(x, low if low.numel() else weight if low_weight is None else low_weight)
    ctx.settings = bias is not None, ctx.needs_input_grad[0], weight.dtype, impl
    ctx.bias_dtype = None if bias is None else bias.dtype


@outside_autocast
def _autograd(ctx, grad, _low, add=None):  # type: ignore[no-untyped-def]
    if grad is None:
        return add, *(None,) * 5
    dx, dw, db = _run_backward(grad, *ctx.saved_tensors, *ctx.settings, add)
    need_x = ctx.needs_input_grad[0]
    return dx if need_x else None, dw, None if ctx.bias_dtype is None else db.to(ctx.bias_dtype), None, None, None


torch.library.register_autograd("fastmim::linear", _autograd, setup_context=_setup_context)
_run_op = shortcut_with_grad(_op, _forward, _setup_context, _autograd)
_run_backward = shortcut(_backward_op, _backward)
_run_and_input = and_input(shortcut(_op, _forward), _setup_context, _autograd)


@register_flop_formula(torch.ops.fastmim.linear)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


@register_flop_formula(torch.ops.fastmim.linear_backward)
def _backward_flops(grad: Any, x: Any, weight: Any, has_bias: bool, need_x: bool, *args: Any, **kwargs: Any) -> int:
    return (1 + need_x) * _flops(x, weight)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None
           ) -> Tensor:
    if x.device.type != "cpu":
        return _reference(x, weight, bias)
    return _run_op(x, weight, bias, low_weight, low_bias, "torch")[0]


def _triton(*args: Tensor | None) -> Tensor:
    return _run_op(*args, "triton")[0]


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, *low: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_IMPLEMENTATIONS: dict[str, Callable] = {"torch": _torch, "triton": _triton, "reference": _reference}
_AND_INPUT: dict[str, Callable] = {
    "torch": lambda *args: _run_and_input(*args, "torch"), "triton": lambda *args: _run_and_input(*args, "triton"),
    "reference": lambda x, *args: (_reference(x, *args), x)}
