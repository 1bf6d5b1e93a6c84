"""Linear layer: matrix products laid out for a CPU, and on a GPU the bias gradient within the weight gradient's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.arguments import check_product, explained, floating, shown
from ..common.define_op import Kept, define_op
from ..common.dispatch import picks_triton
from ..common.rows import cast, statistics_dtype
from . import on_torch


@explained()
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
        ValueError: An argument is not what is said here.
    """
    dtype = product_dtype(x)
    if not x.is_cpu and impl in ("auto", "torch") and not picks_triton("linear", impl, x.device, dtype):
        impl = "reference"  # torch's own layer: nothing of the CPU's is of use elsewhere
    return OP(*arguments(x, weight, bias, low_weight, low_bias, dtype), impl=impl)


@explained()
def linear_and_input(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, low_weight: Tensor | None = None,
                     low_bias: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(:func:`linear`, x), the second for another reader of x: one product then adds both gradients up."""
    dtype = product_dtype(x)
    if x.dtype != dtype:
        return linear(x, weight, bias, low_weight=low_weight, low_bias=low_bias, impl=impl), x
    return OP.hand_on(*arguments(x, weight, bias, low_weight, low_bias, dtype), impl=impl)


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of x; float64 stays."""
    device = x.device.type
    lower = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lower else x.dtype


def arguments(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None,
              dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Those of the op, for a product in ``dtype``; checked."""
    _check(x, weight, bias, low_weight, low_bias)
    return cast(x, dtype), weight, bias, fitting(low_weight, dtype), fitting(low_bias, dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None) -> None:
    floating("linear", x, weight, bias, low_weight, low_bias)
    check_product("linear", x, "x", weight, "weight", bias, "bias")
    if low_weight is not None or low_bias is not None:
        check_low("linear", "low_weight", low_weight, weight)
        check_low("linear", "low_bias", low_bias, bias)


def check_low(op: str, name: str, low: Tensor | None, parameter: Tensor | None) -> None:
    """Raise ``ValueError`` unless the copy ``low``, where there is one, has the shape of ``parameter``."""
    if low is not None and (parameter is None or low.shape != parameter.shape):
        raise ValueError(f"{op}: {name} must have the shape of its parameter, {shown(parameter)}, got {shown(low)}")


def fitting(low: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``low`` cut off from autograd; None when it is not in ``dtype`` and therefore of no use."""
    if low is None or low.dtype != dtype:
        return None
    return low.detach() if low.requires_grad else low


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor | None, low_bias: Tensor | None,
          impl: str) -> tuple[Tensor, Tensor]:
    """(result, W in the dtype of x, empty when that is its own or given)."""
    own = weight.dtype != x.dtype and low_weight is None
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(weight.shape if own else (0,))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, need_x: bool, weight_dtype: torch.dtype,
                   impl: str, add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(d x + ``add``, d W in ``weight_dtype``, d b); empty where not wanted."""
    return (x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape, dtype=weight_dtype),
            x.new_empty(weight.shape[0] if has_bias else 0, dtype=statistics_dtype(x.dtype)))


def _save(inputs: Any, outputs: Any) -> Any:
    x, weight, bias, low_weight, _, impl = inputs
    _, low = outputs
    multiplied = low if low.numel() else weight if low_weight is None else low_weight
    return (x, multiplied), (None if bias is None else bias.dtype, weight.dtype, impl)


def _gradients(backward: Callable, kept: Kept, grad: Tensor | None, add: Tensor | None = None
               ) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (add,)
    (x, weight), (bias_dtype, weight_dtype, impl), need_x = kept.tensors, kept.settings, kept.needs[0]
    dx, dw, db = backward(grad, x, weight, bias_dtype is not None, need_x, weight_dtype, impl, add)
    return dx if need_x else None, dw, None if bias_dtype is None else cast(db, bias_dtype)


def _flops(x: Any, weight: Any, *_: Any) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def _backward_flops(grad: Any, x: Any, weight: Any, has_bias: bool, need_x: bool, *_: Any) -> int:
    return (1 + need_x) * _flops(x, weight)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, *low: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


OP = define_op("linear", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients, readers=lambda inputs, outputs: (outputs[0], inputs[0]),
               flops=_flops, backward_flops=_backward_flops)
