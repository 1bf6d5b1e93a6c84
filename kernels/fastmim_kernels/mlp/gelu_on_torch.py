"""GELU in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.rows import column_sum, statistics_dtype


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and result of the op ``fastmim::gelu``."""
    x = x.contiguous()
    return F.gelu(x) if bias is None else torch.ops.aten.gelu_(x + bias.to(x.dtype))


def backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::gelu_backward``."""
    grad, x = grad.contiguous(), x.contiguous()
    z = x if bias is None else x + bias.to(x.dtype)
    dx = torch.ops.aten.gelu_backward(grad, z)
    wide = statistics_dtype(x.dtype)
    return dx, x.new_empty(0, dtype=wide) if bias is None else column_sum(dx).to(wide)
