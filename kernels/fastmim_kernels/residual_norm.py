"""Residual addition, stochastic depth, LayerScale and LayerNorm of a transformer block, in both orders.

One pass over the rows forward and one backward: what autograd would run as an addition, a product, a
LayerNorm, a cast for the next matrix product, the bias of the previous one, and the gradients of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .dispatch import resolve
from .eager import shortcut, shortcut_with_grad
from .rows import column_sum, layer_norm, layer_norm_backward, refuse_float64, statistics_dtype

ORDERS = ("pre", "post")


def residual_norm(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, order: str,
                  eps: float = 1e-5, drop_scale: Tensor | None = None, gamma: Tensor | None = None,
                  branch_bias: Tensor | None = None, out_dtype: torch.dtype | None = None, impl: str = "auto"
                  ) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise.

    ``order="pre"`` (Swin, ViT): ``r = residual + s·γ·(branch + b)``, returns ``(r, LN(r))``.
    ``order="post"`` (SwinV2): ``r = residual + s·LN(branch + b)``, returns ``(r, r)``.

    The first result is the stream, in the dtype of ``residual``; the second is for the next matrix product,
    in ``out_dtype``. Feeding each to its own reader saves a cast and the addition of two gradients.

    Args:
        residual: (B, …, C), the residual stream.
        branch: (B, …, C), output of attention or MLP.
        weight: (C,) and bias: (C,), the LayerNorm.
        order: "pre" or "post".
        eps: Of the LayerNorm.
        drop_scale: (B,) factor s of each sample (0 or 1/keep), or None for 1. It gets no gradient.
        gamma: (C,) LayerScale γ ("pre" only), or None for 1.
        branch_bias: (C,) bias b of the linear layer that made ``branch``, or None for 0. On a GPU its
            gradient is nearly free here, where the linear layer would read the whole gradient again.
        out_dtype: Of the second result. Default: autocast's where it is on, else that of ``branch``.
        impl: See :mod:`fastmim_kernels.dispatch`.

    Raises:
        ValueError: Unknown order, γ with "post", or shapes that do not belong together.
    """
    _check(residual, branch, weight, bias, order, drop_scale, gamma, branch_bias)
    device = residual.device.type
    function = resolve("residual_norm", impl, _IMPLEMENTATIONS, residual.device)
    if out_dtype is None:
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else branch.dtype
    if drop_scale is not None:
        drop_scale = drop_scale.detach().to(statistics_dtype(residual.dtype))
    with torch.autocast(device, enabled=False):
        return function(residual, branch, weight, bias, branch_bias, drop_scale, gamma, order, eps, out_dtype)


def traffic(rows: int, channels: int, order: str, *, itemsize: int = 2, branch_itemsize: int = 2,
            out_itemsize: int = 2, param_itemsize: int = 4, drop_scale: bool = False, gamma: bool = False,
            branch_bias: bool = False) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward, both results in use.

    Args:
        rows, channels: Of the stream.
        order: As of :func:`residual_norm`.
        itemsize, branch_itemsize, out_itemsize, param_itemsize: Bytes of a value of the stream, the branch,
            the second result ("post": equal to the stream's means there is none), a parameter.
        drop_scale, gamma, branch_bias: Given.
    """
    n, parameter, post = rows * channels, channels * param_itemsize, order == "post"
    second = 0 if post and out_itemsize == itemsize else out_itemsize
    scales, extras = 4 * rows * drop_scale, gamma + branch_bias
    forward = (n * (itemsize + branch_itemsize) + parameter * (2 + extras) + scales,
               n * (itemsize + second) + 8 * rows, 0)
    read = n * (itemsize + second) + 8 * rows + scales + parameter * (1 + extras)
    read += n * branch_itemsize if post else n * (itemsize + branch_itemsize * gamma)
    own_branch = post or drop_scale or gamma or itemsize != branch_itemsize
    written = n * itemsize * (not post or second > 0) + n * branch_itemsize * own_branch
    return forward, (read, written + 4 * channels * (2 + extras), 0)


def _check(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, order: str,
           drop_scale: Tensor | None, gamma: Tensor | None, branch_bias: Tensor | None) -> None:
    if order not in ORDERS or (order == "post" and gamma is not None):
        raise ValueError(f"residual_norm: order={order!r} with gamma={gamma is not None}: "
                         "order must be 'pre' or 'post', and 'post' takes no gamma")
    if residual.ndim < 2 or residual.shape != branch.shape:
        raise ValueError("residual_norm: residual and branch must both be (B, …, C), got "
                         f"{tuple(residual.shape)} and {tuple(branch.shape)}")
    shape = residual.shape[-1:]
    vectors = {"weight": weight, "bias": bias, "gamma": gamma, "branch_bias": branch_bias}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != shape:
            raise ValueError(f"residual_norm: {name} must be {tuple(shape)}, got {tuple(vector.shape)}")
    if drop_scale is not None and drop_scale.shape != residual.shape[:1]:
        raise ValueError(f"residual_norm: drop_scale must be ({residual.shape[0]},), got "
                         f"{tuple(drop_scale.shape)}")


def _forward(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
             drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float, out_dtype: torch.dtype,
             impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new residual, second result, mean, rstd); the second is empty where it would equal the first."""
    residual, branch = residual.contiguous(), branch.contiguous()
    if impl == "triton":
        from .triton import residual_norm as kernels
        refuse_float64("residual_norm", residual)
        return kernels.forward(residual, branch, weight, bias, branch_bias, drop_scale, gamma, order, eps,
                               out_dtype)
    if branch_bias is not None:
        branch = branch + branch_bias.to(branch.dtype)
    factor = _factor(drop_scale, gamma, residual.ndim, branch.dtype)
    if order == "post":
        branch, mean, rstd = layer_norm(branch, weight, bias, eps)
        out = added = _add(residual, branch, factor)
        out = out.new_empty(0) if out_dtype == out.dtype else out.to(out_dtype)
    else:
        added = _add(residual, branch, factor)
        out, mean, rstd = layer_norm(added, weight, bias, eps)
    return added, out.to(out_dtype), mean, rstd


_op = torch.library.custom_op("fastmim::residual_norm", _forward, mutates_args=())


@_op.register_fake
def _(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
      drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float, out_dtype: torch.dtype,
      impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = residual.shape
    out = residual.new_empty(shape if order == "pre" or out_dtype != residual.dtype else (0,), dtype=out_dtype)
    rows = residual.new_empty(residual.numel() // shape[-1], dtype=statistics_dtype(residual.dtype))
    return residual.new_empty(shape), out, rows, torch.empty_like(rows)


def _factor(drop_scale: Tensor | None, gamma: Tensor | None, ndim: int, dtype: torch.dtype
            ) -> Tensor | None:
    """s·γ, broadcastable to (B, …, C)."""
    factor = None if drop_scale is None else drop_scale.view(-1, *[1] * (ndim - 1))
    if gamma is not None:
        factor = gamma if factor is None else factor * gamma
    return None if factor is None else factor.to(dtype)


def _add(residual: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    added = residual + branch if factor is None else torch.addcmul(residual, branch, factor)
    return added.to(residual.dtype)


def _backward(grad_added: Tensor | None, grad_out: Tensor | None, saved: Tensor, branch: Tensor | None,
              mean: Tensor, rstd: Tensor, weight: Tensor, branch_bias: Tensor | None,
              drop_scale: Tensor | None, gamma: Tensor | None, order: str, dtype: torch.dtype,
              branch_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """(d residual in ``dtype``, d branch, (2 to 4, C) of d weight, d bias[, d branch_bias][, d gamma]).

    ``saved`` is the branch ("post") or the new residual ("pre"). d residual is empty where it is
    ``grad_added`` itself, d branch where it is d residual.
    """
    grad_added, grad_out = (None if g is None else g.contiguous() for g in (grad_added, grad_out))
    saved, branch = saved.contiguous(), None if branch is None else branch.contiguous()
    args = (saved, branch, mean, rstd, weight, branch_bias, drop_scale, gamma)
    if impl == "triton":
        from .triton import residual_norm as kernels
        return kernels.backward(grad_added, grad_out, *args, order, dtype, branch_dtype)
    if order == "post":
        return _backward_post(grad_added, grad_out, saved, mean, rstd, weight, branch_bias, drop_scale, dtype)
    return _backward_pre(grad_added, grad_out, *args, dtype, branch_dtype)


_backward_op = torch.library.custom_op("fastmim::residual_norm_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(grad_added: Tensor | None, grad_out: Tensor | None, saved: Tensor, branch: Tensor | None, mean: Tensor,
      rstd: Tensor, weight: Tensor, branch_bias: Tensor | None, drop_scale: Tensor | None,
      gamma: Tensor | None, order: str, dtype: torch.dtype, branch_dtype: torch.dtype, impl: str
      ) -> tuple[Tensor, Tensor, Tensor]:
    own_residual, own_branch = owned(order, grad_out, drop_scale, gamma, dtype, branch_dtype)
    sums = 2 + (branch_bias is not None) + (gamma is not None)
    return (saved.new_empty(saved.shape if own_residual else (0,), dtype=dtype),
            saved.new_empty(saved.shape if own_branch else (0,), dtype=branch_dtype),
            saved.new_empty((sums, saved.shape[-1]), dtype=mean.dtype))


def owned(order: str, grad_out: Tensor | None, drop_scale: Tensor | None, gamma: Tensor | None,
          dtype: torch.dtype, branch_dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether d residual and d branch are tensors of their own, or equal to grad_added and to d residual."""
    post = order == "post"
    return (not post or grad_out is not None,
            post or drop_scale is not None or gamma is not None or branch_dtype != dtype)


def _backward_post(grad_added: Tensor | None, grad_out: Tensor | None, branch: Tensor, mean: Tensor,
                   rstd: Tensor, weight: Tensor, branch_bias: Tensor | None, drop_scale: Tensor | None,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out is None:
        assert grad_added is not None
        grad, d_residual = grad_added, branch.new_empty(0, dtype=dtype)
    else:
        grad = d_residual = grad_out.to(dtype) if grad_added is None else grad_added + grad_out
    grad = grad.to(branch.dtype)
    factor = _factor(drop_scale, None, branch.ndim, branch.dtype)
    grad = grad if factor is None else grad * factor
    x = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
    d_branch, sums = layer_norm_backward(grad, x, mean, rstd, weight)
    d_params = [*sums]
    if branch_bias is not None:
        d_params.append(column_sum(d_branch))
    return d_residual, d_branch, torch.stack([d.to(mean.dtype) for d in d_params])


def _backward_pre(grad_added: Tensor | None, grad_out: Tensor | None, added: Tensor, branch: Tensor | None,
                  mean: Tensor, rstd: Tensor, weight: Tensor, branch_bias: Tensor | None,
                  drop_scale: Tensor | None, gamma: Tensor | None, dtype: torch.dtype,
                  branch_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out is None:
        assert grad_added is not None
        d_residual, d_params = grad_added.clone(), [mean.new_zeros(weight.shape) for _ in range(2)]
    else:
        d_residual, sums = layer_norm_backward(grad_out, added, mean, rstd, weight)
        d_params = [*sums]
        if grad_added is not None:
            d_residual += grad_added
    factor = _factor(drop_scale, gamma, added.ndim, dtype)
    if factor is None and branch_dtype == dtype:
        d_branch = added.new_empty(0)
    else:
        d_branch = (d_residual if factor is None else d_residual * factor).to(branch_dtype)
    if branch_bias is not None:
        d_params.append(column_sum(d_branch if d_branch.numel() else d_residual))
    if gamma is not None:
        assert branch is not None
        branch = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
        # Summed within each sample first: then the factor of the samples is a small product.
        products = (d_residual * branch).flatten(1, -2).sum(1, dtype=mean.dtype)
        d_params.append(products.sum(0) if drop_scale is None else drop_scale @ products)
    return d_residual, d_branch, torch.stack([d.to(mean.dtype) for d in d_params])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    residual, branch, weight, bias, branch_bias, drop_scale, gamma, order, _, _, impl = inputs
    added, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    saved, kept = (branch, None) if order == "post" else (added, branch if gamma is not None else None)
    ctx.save_for_backward(saved, kept, mean, rstd, weight, branch_bias, drop_scale, gamma)
    ctx.settings = order, residual.dtype, branch.dtype, impl
    ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, branch_bias, gamma)]


def _autograd(ctx, grad_added, grad_out, _mean, _rstd):  # type: ignore[no-untyped-def]
    if grad_out is not None and not grad_out.numel():
        grad_out = None
    if grad_added is None and grad_out is None:
        return (None,) * 11
    d_residual, d_branch, found = _run_backward(grad_added, grad_out, *ctx.saved_tensors, *ctx.settings)
    d_residual = d_residual if d_residual.numel() else grad_added
    d_branch = d_branch if d_branch.numel() else d_residual
    sums = iter(found)
    d_params = [None if dtype is None else next(sums).to(dtype) for dtype in ctx.dtypes]
    return d_residual, d_branch, *d_params[:3], None, d_params[3], None, None, None, None


torch.library.register_autograd("fastmim::residual_norm", _autograd, setup_context=_setup_context)
_run_op = shortcut_with_grad(_op, _forward, _setup_context, _autograd)
_run_backward = shortcut(_backward_op, _backward)


# No matrix product inside; torch's counter counts nothing else either.
@register_flop_formula([torch.ops.fastmim.residual_norm, torch.ops.fastmim.residual_norm_backward])
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def _run(residual: Tensor, *args, impl: str) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    added, out, _, _ = _run_op(residual, *args, impl)
    order, _, out_dtype = args[-3:]
    return added, added if order == "post" and out_dtype == residual.dtype else out


def _reference(residual: Tensor, branch: Tensor, weight: Tensor, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    *tensors, order, eps, out_dtype = args
    wide = torch.promote_types(torch.promote_types(residual.dtype, branch.dtype), weight.dtype)
    given: list[Any] = [None if t is None else t.to(wide) for t in (residual, branch, weight, *tensors)]
    added, out = reference.residual_norm(*[*given, order, eps])
    return added.to(residual.dtype), out.to(out_dtype)


_IMPLEMENTATIONS: dict[str, Callable] = {"torch": partial(_run, impl="torch"), "triton": partial(_run, impl="triton"),
                    "reference": _reference}
