"""``residual_norm`` in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.define_op import autograd_function
from ..common.rows import cast, column_sum, layer_norm, layer_norm_backward, nothing, statistics_dtype
from ..patch_merge.on_torch import gather, scatter

IN_ONE = 1 << 22
"""Values of a low-precision branch whose gradient a CPU finds in one go, as autograd does; of more, in chunks."""
KEPT_WIDE = 1 << 23
"""Values of such a branch that are kept in float32 for backward, 32 MiB at most: to widen them again costs a fifth of
the pass. More are kept as they are."""
CHUNK = 1 << 19
"""Values of a chunk, whose float32 gradient stays in cache until it is rounded."""


def forward(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
            drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float, stream_dtype: torch.dtype,
            out_dtype: torch.dtype, merge: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::residual_norm``."""
    residual, branch = (None if t is None else t.contiguous() for t in (residual, branch))
    if branch is None:
        assert residual is not None
        out, mean, rstd = layer_norm(residual, weight, bias, eps)
        return residual.new_empty(0), out.to(out_dtype), mean, rstd
    if branch_bias is not None:
        branch = branch + branch_bias.to(branch.dtype)
    factor = _factor(drop_scale, gamma, branch.ndim, branch.dtype)
    if order == "post":
        # Widened before, not behind: torch's additions of two dtypes take as long as a pass more.
        branch = branch if residual is None else cast(branch, torch.promote_types(branch.dtype, residual.dtype))
        branch, mean, rstd = layer_norm(branch, weight, bias, eps)
        if merge:
            added = gather(_add(residual, branch, factor, branch.dtype if residual is None else residual.dtype),
                           out_dtype)
        elif residual is not None and factor is None and branch.dtype == stream_dtype:
            added = branch.add_(residual)
        else:
            added = _add(residual, branch, factor, stream_dtype)
        return added, nothing(added) if out_dtype == stream_dtype else added.to(out_dtype), mean, rstd
    added = _add(residual, branch, factor, stream_dtype)
    out, mean, rstd = layer_norm(added, weight, bias, eps)
    return added, out.to(out_dtype), mean, rstd


def composed(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
             drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float, stream_dtype: torch.dtype,
             out_dtype: torch.dtype, merge: bool) -> tuple[Tensor, Tensor] | None:
    """Both results where a CPU adds and normalises in float32 or better: there autograd keeps and moves as little.

    Not with γ, whose gradient would be a map before it is summed.
    """
    if residual is None or branch is None or gamma is not None or merge or not weight.is_cpu:
        return None
    dtype = residual.dtype
    if not dtype == weight.dtype == bias.dtype == statistics_dtype(dtype) == torch.promote_types(dtype, branch.dtype):
        return None
    x = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
    factor = _factor(drop_scale, None, branch.ndim, branch.dtype if order == "pre" else dtype)
    if order == "pre":
        added = _add(residual, x, factor, dtype)
        return added, cast(F.layer_norm(added, weight.shape, weight, bias, eps), out_dtype)
    if x.dtype == dtype or x.numel() <= IN_ONE:
        x = F.layer_norm(cast(x, dtype), weight.shape, weight, bias, eps)
    else:
        x = _NORM_OF_LOW.apply(x, weight, bias, eps)
    added = x.add_(residual) if factor is None else _add(residual, x, factor, dtype)
    return added, cast(added, out_dtype)


def backward(grad_added: Tensor | None, grad_out: Tensor | None, saved: Tensor, branch: Tensor | None, mean: Tensor,
             rstd: Tensor, weight: Tensor, branch_bias: Tensor | None, drop_scale: Tensor | None,
             gamma: Tensor | None, order: str, merge: bool, dtype: torch.dtype | None,
             branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::residual_norm_backward``."""
    grad_added, grad_out, branch = (None if t is None else t.contiguous() for t in (grad_added, grad_out, branch))
    saved = saved.contiguous()
    if order == "post":
        if merge and grad_added is not None:
            height, width = saved.shape[1:3]
            # As the gradient of a second reader it is added, that is, returned as d residual.
            grad_out = scatter(grad_added, height, width, dtype or grad_added.dtype)
            grad_added = None
        return _backward_post(grad_added, grad_out, saved, mean, rstd, weight, branch_bias, drop_scale, dtype)
    assert dtype is not None
    return _backward_pre(grad_added, grad_out, saved, branch, mean, rstd, weight, branch_bias, drop_scale, gamma,
                         dtype, branch_dtype)


def _norm_of_low(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of low-precision x in the dtype of its parameters."""
    wide, ctx.dtype = x.to(weight.dtype), x.dtype
    out, mean, rstd = layer_norm(wide, weight, bias, eps)
    ctx.save_for_backward(wide if x.numel() <= KEPT_WIDE else x, mean, rstd, weight)
    return out


def _norm_of_low_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight = ctx.saved_tensors
    channels = x.shape[-1]
    d_x = torch.empty_like(x, dtype=ctx.dtype, memory_format=torch.contiguous_format)
    sums = weight.new_zeros((2, channels))
    rows = max(CHUNK // channels, 1)
    maps = (t.reshape(-1, channels).split(rows) for t in (grad, x, d_x))
    for part, own, out, own_mean, own_rstd in zip(*maps, mean.split(rows), rstd.split(rows), strict=True):
        found, d_weight, d_bias = layer_norm_backward(part, cast(own, weight.dtype), own_mean, own_rstd, weight)
        out.copy_(found)
        sums[0] += d_weight
        sums[1] += d_bias
    return d_x, *sums.unbind(0), None


_NORM_OF_LOW = autograd_function("norm_of_low", _norm_of_low, _norm_of_low_backward)


def _factor(drop_scale: Tensor | None, gamma: Tensor | None, ndim: int, dtype: torch.dtype
            ) -> Tensor | None:
    """s·γ, broadcastable to (B, …, C)."""
    factor = None if drop_scale is None else drop_scale.view(-1, *[1] * (ndim - 1))
    if gamma is not None:
        factor = gamma if factor is None else factor * gamma
    return None if factor is None else factor.to(dtype)


def _add(residual: Tensor | None, branch: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    if residual is None:
        return (branch if factor is None else branch * factor).to(dtype)
    if factor is None and branch.dtype != dtype == residual.dtype:
        return branch.to(dtype).add_(residual)  # in half the time of an addition of two dtypes
    added = residual + branch if factor is None else torch.addcmul(residual, branch, factor)
    return added.to(dtype)


def _backward_post(grad_added: Tensor | None, grad_out: Tensor | None, branch: Tensor, mean: Tensor,
                   rstd: Tensor, weight: Tensor, branch_bias: Tensor | None, drop_scale: Tensor | None,
                   dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    d_residual = nothing(branch, dtype)
    if grad_out is None:
        assert grad_added is not None
        grad = grad_added
    else:
        grad = cast(grad_out, dtype or grad_out.dtype)
        if grad_added is not None:
            # Into the copy that the cast has made, where it has.
            grad = grad + grad_added if grad is grad_out else grad.add_(grad_added)
        d_residual = d_residual if dtype is None else grad
    factor = _factor(drop_scale, None, branch.ndim, mean.dtype)
    grad = grad if factor is None else grad * factor
    x = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
    d_branch, *sums = layer_norm_backward(grad, x, mean, rstd, weight)
    return d_residual, d_branch, _stacked(sums if branch_bias is None else [*sums, column_sum(d_branch)])


def _stacked(sums: list[Tensor]) -> Tensor:
    return torch.stack([cast(d, sums[0].dtype) for d in sums])


def _backward_pre(grad_added: Tensor | None, grad_out: Tensor | None, added: Tensor, branch: Tensor | None,
                  mean: Tensor, rstd: Tensor, weight: Tensor, branch_bias: Tensor | None,
                  drop_scale: Tensor | None, gamma: Tensor | None, dtype: torch.dtype,
                  branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out is None:
        assert grad_added is not None
        d_residual, d_params = grad_added.clone(), [*mean.new_zeros((2, *weight.shape))]
    else:
        d_residual, *d_params = layer_norm_backward(grad_out, added, mean, rstd, weight)
        if grad_added is not None:
            d_residual += grad_added
    factor = _factor(drop_scale, gamma, added.ndim, dtype)
    if branch_dtype is None or (factor is None and branch_dtype == dtype):
        d_branch = nothing(added)
    else:
        d_branch = (d_residual if factor is None else d_residual * factor).to(branch_dtype)
    if branch_bias is not None:
        d_params.append(column_sum(d_branch if d_branch.numel() else d_residual))
    if gamma is not None:
        assert branch is not None
        branch = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
        # Summed within each sample first: then the factor of the samples is a small product.
        products = (d_residual * branch).unsqueeze(1).flatten(1, -2).sum(1, dtype=mean.dtype)
        d_params.append(products.sum(0) if drop_scale is None else drop_scale @ products)
    return d_residual, d_branch, _stacked(d_params)
