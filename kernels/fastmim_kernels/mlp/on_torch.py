"""``mlp`` in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.cpu import onednn_multiplies
from ..common.rows import column_sum, nothing, statistics_dtype
from ..linear.on_torch import in_dtype_of, input_gradient, parameter_gradients, product, weight_gradient

KEPT_ACTIVATION = 1 << 23
"""Values of a bfloat16 GELU that a CPU keeps at most, 16 MiB."""
KEPT_CHANNELS = 512
"""Of x, where it is kept: beside the products of more, to compute it again is 2 % of backward and less."""


def forward(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
            low_weight1: Tensor | None, low_weight2: Tensor | None, recompute_fc1: bool
            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::mlp``."""
    (low1, cast1), (low2, cast2) = in_dtype_of(x, weight1, low_weight1), in_dtype_of(x, weight2, low_weight2)
    pre = product(x.reshape(-1, x.shape[-1]), low1, bias1)
    activation = torch.ops.aten.gelu_(pre) if recompute_fc1 else F.gelu(pre)
    out = product(activation, low2, bias2).view(*x.shape[:-1], -1)
    kept = activation if keeps_activation(x, len(weight1), recompute_fc1) else nothing(x)
    return out, nothing(x) if recompute_fc1 else pre, cast1, cast2, kept


def keeps_activation(x: Tensor, hidden: int, recompute_fc1: bool) -> bool:
    """Whether the GELU is kept beside its input, as by autograd: where a CPU's products are short in bfloat16.

    There it would take up to an eighth of backward.
    """
    if recompute_fc1 or not x.is_cpu or x.dtype != torch.bfloat16 or not onednn_multiplies(x.dtype):
        return False
    channels = x.shape[-1]
    return channels <= KEPT_CHANNELS and x.numel() // channels * hidden <= KEPT_ACTIVATION


def backward(grad: Tensor, x: Tensor, pre: Tensor, activation: Tensor, weight1: Tensor, bias1: Tensor | None,
             weight2: Tensor, has_bias2: bool, weight1_dtype: torch.dtype, weight2_dtype: torch.dtype,
             add: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::mlp_backward``."""
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
    if not pre.numel():
        pre = product(rows, weight1, bias1)
    d_hidden = input_gradient(grad, weight2, None)
    torch.ops.aten.gelu_backward.grad_input(d_hidden, pre, grad_input=d_hidden)
    wide = statistics_dtype(pre.dtype)
    d_bias1 = pre.new_empty(0, dtype=wide) if bias1 is None else column_sum(d_hidden).to(wide)
    activation = activation if activation.numel() else F.gelu(pre)
    d_weight2, d_bias2 = parameter_gradients(grad, activation, weight2_dtype, has_bias2)
    d_weight1 = weight_gradient(d_hidden, rows, weight1_dtype)
    return input_gradient(d_hidden, weight1, add).view(x.shape), d_weight1, d_bias1, d_weight2, d_bias2
