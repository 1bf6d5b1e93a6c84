"""A linear layer on a GPU: cuBLAS, but for gradients that one pass gives together.

The gradient of the bias comes with the weight's, and the sum of the gradients of two readers of x with the input's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.rows import nothing
from . import on_torch
from .on_torch import forward
from .product_add import product_add
from .weight_gradient import weight_gradient

__all__ = ["backward", "forward", "input_gradient", "parameter_gradients"]


def backward(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, need_x: bool, weight_dtype: torch.dtype,
             add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::linear_backward``."""
    grad = grad.contiguous()
    dx = input_gradient(grad, weight, add) if need_x else nothing(x)
    return dx, *parameter_gradients(grad, x, weight_dtype, has_bias)


def input_gradient(grad: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    """As :func:`.on_torch.input_gradient`, of (…, N) grad and in its shape."""
    return on_torch.input_gradient(grad, weight, None) if add is None else product_add(grad, weight, add)


def parameter_gradients(grad: Tensor, x: Tensor, dtype: torch.dtype, has_bias: bool) -> tuple[Tensor, Tensor]:
    """As :func:`.on_torch.parameter_gradients`, of contiguous (…, N) and (…, K)."""
    if has_bias:
        return weight_gradient(grad, x.contiguous(), dtype)
    return on_torch.parameter_gradients(grad.flatten(0, -2), x.flatten(0, -2), dtype, False)
