"""A linear layer on a GPU: cuBLAS, but for gradients that one pass gives together.

The gradient of the bias comes with the weight's, and the sum of the gradients of two readers of x with the input's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.rows import nothing
from . import on_torch
from .on_torch import forward
from .policy import make
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
    """As :func:`.on_torch.input_gradient`, of (…, N) grad, in the shape of grad or of ``add``."""
    if add is None:
        return on_torch.input_gradient(grad, weight, None)
    depth, columns = weight.shape

    def apart() -> Tensor:
        return on_torch.product(grad, weight.t(), None).view(add.shape).add_(add)

    def fused(tiles: dict[str, int] | None = None) -> Tensor:
        return product_add(grad, weight, add, tiles)

    return make("product_add", grad.numel() // depth, columns, depth, grad, fused, apart)


def parameter_gradients(grad: Tensor, x: Tensor, dtype: torch.dtype, has_bias: bool) -> tuple[Tensor, Tensor]:
    """As :func:`.on_torch.parameter_gradients`, of contiguous (…, N) and (…, K)."""
    if not has_bias:
        return on_torch.weight_gradient(_rows(grad), _rows(x), dtype), nothing(x, torch.float32)
    columns = grad.shape[-1]

    def apart() -> tuple[Tensor, Tensor]:
        return on_torch.parameter_gradients(_rows(grad), _rows(x), dtype, True)

    def fused() -> tuple[Tensor, Tensor]:
        return weight_gradient(grad, x.contiguous(), dtype)

    return make("weight_gradient", grad.numel() // columns, columns, x.shape[-1], grad, fused, apart)


def _rows(x: Tensor) -> Tensor:
    """(…, C) as a matrix."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
