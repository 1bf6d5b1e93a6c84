"""Residual addition, stochastic depth, LayerScale and LayerNorm of a transformer block, in both orders.

One pass over the rows forward and one backward: what autograd would run as an addition, a product, a
LayerNorm, a cast for the next matrix product, the bias of the previous one, and the gradients of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import check_norm, explained, floating, shown, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import cast, statistics_dtype
from . import on_torch
from .layout import given, merged_shape, owned, written

ORDERS = ("pre", "post")


@explained()
def residual_norm(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor, *, order: str,
                  eps: float = 1e-5, drop_scale: Tensor | None = None, gamma: Tensor | None = None,
                  branch_bias: Tensor | None = None, stream_dtype: torch.dtype | None = None,
                  out_dtype: torch.dtype | None = None, merge: bool = False, impl: str = "auto"
                  ) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise.

    ``order="pre"`` (Swin, ViT): ``r = residual + s·γ·(branch + b)``, returns ``(r, LN(r))``.
    ``order="post"`` (SwinV2): ``r = residual + s·LN(branch + b)``, returns ``(r, r)``.

    The first result is the stream, in the dtype of ``residual``; the second is for the next matrix product,
    in ``out_dtype``. Feeding each to its own reader saves a cast and the addition of two gradients, even where
    both are the same memory: do not write into them.

    Args:
        residual: (B, …, C), the residual stream; None ("post") starts it: ``r = s·LN(branch + b)``.
        branch: (B, …, C), output of attention or MLP; None ("pre") adds nothing: ``r = residual``.
        weight: (C,) and bias: (C,), the LayerNorm.
        order: "pre" or "post".
        eps: Of the LayerNorm.
        drop_scale: (B,) factor s of each sample (0 or 1/keep), or None for 1. It gets no gradient.
        gamma: (C,) LayerScale γ ("pre" only), or None for 1.
        branch_bias: (C,) bias b of the linear layer that made ``branch``, or None for 0. On a GPU its
            gradient is nearly free here, where the linear layer would read the whole gradient again.
        stream_dtype: Of the first result where ``residual`` is None. Default: that of ``branch``.
        out_dtype: Of the second result. Default: autocast's where it is on, else that of ``branch``.
        merge: Write the stream of (B, H, W, C) as :func:`.patch_merge.patch_merge` would gather it, in
            ``out_dtype``, (B, H/2, W/2, 4C): where a stage ends and nothing else reads it ("post" only).
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: An argument is not what is said here.
    """
    return OP.hand_on(*arguments(residual, branch, weight, bias, branch_bias, drop_scale, gamma, order, eps,
                                 stream_dtype, out_dtype, merge), impl=impl)


def arguments(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor,
              branch_bias: Tensor | None, drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float,
              stream_dtype: torch.dtype | None, out_dtype: torch.dtype | None, merge: bool) -> tuple[Any, ...]:
    """Those of the op; checked."""
    _check(residual, branch, weight, bias, order, drop_scale, gamma, branch_bias)
    check_norm("residual_norm", eps, stream_dtype=stream_dtype, out_dtype=out_dtype)
    like = given(residual, branch)
    if merge is not False:
        _check_merge(merge, order, like)
    if out_dtype is None:
        device = like.device.type
        dtype = like.dtype if branch is None else branch.dtype
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    stream_dtype = (stream_dtype or like.dtype) if residual is None else residual.dtype
    stream_dtype = out_dtype if merge else stream_dtype
    if drop_scale is not None:
        drop_scale = cast(drop_scale.detach(), statistics_dtype(like.dtype))
    return (residual, branch, weight, bias, branch_bias, drop_scale, gamma, order, eps, stream_dtype, out_dtype,
            merge)


@explained()
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, out_dtype: torch.dtype | None = None,
               impl: str = "auto") -> Tensor:
    """LayerNorm of (B, …, C) with float32 statistics that writes ``out_dtype`` at once, see :func:`residual_norm`,
    whose errors are raised too."""
    if out_dtype is None and torch.is_autocast_enabled(x.device.type):
        out_dtype = torch.get_autocast_dtype(x.device.type)
    dtype = out_dtype or x.dtype
    floating("layer_norm", x, weight, bias)
    if x.ndim < 2 or not x.shape[-1]:
        raise wrong("layer_norm", "x", "(B, …, C)", x)
    _check_vectors("layer_norm", x, "x", {"weight": weight, "bias": bias})
    check_norm("layer_norm", eps, out_dtype=out_dtype)
    return residual_norm(None, x, weight, bias, order="post", eps=eps, stream_dtype=dtype, out_dtype=dtype,
                         impl=impl)[0]


def traffic(rows: int, channels: int, order: str, *, itemsize: int = 2, branch_itemsize: int = 2,
            out_itemsize: int = 2, param_itemsize: int = 4, drop_scale: bool = False, gamma: bool = False,
            branch_bias: bool = False, residual: bool = True, branch: bool = True
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward, both results in use.

    Args:
        rows, channels: Of the stream.
        order: As of :func:`residual_norm`.
        itemsize, branch_itemsize, out_itemsize, param_itemsize: Bytes of a value of the stream, the branch,
            the second result ("post": equal to the stream's means there is none), a parameter.
        drop_scale, gamma, branch_bias, residual, branch: Given.
    """
    n, parameter, post = rows * channels, channels * param_itemsize, order == "post"
    itemsize_b = branch_itemsize * branch
    second = 0 if post and out_itemsize == itemsize else out_itemsize
    scales, extras = 4 * rows * drop_scale, gamma + branch_bias
    forward = (n * (itemsize * residual + itemsize_b) + parameter * (2 + extras) + scales,
               n * (itemsize * branch + second) + 8 * rows, 0)
    # "pre" reads the stream again, "post" the branch instead; every result's gradient comes once.
    read = n * (itemsize + second) + 8 * rows + scales + parameter * (1 + extras)
    read += n * itemsize_b if post else n * (itemsize + itemsize_b * gamma)
    own_branch = branch and (post or drop_scale or gamma or itemsize != branch_itemsize)
    written = n * itemsize * (not post or (second > 0 and residual)) + n * itemsize_b * own_branch
    return forward, (read, written + 4 * channels * (2 + extras), 0)


def _check_vectors(op: str, rows: Tensor, rows_name: str, vectors: dict[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless all ``vectors`` that are given are (C,) for ``rows`` (…, C)."""
    channels = rows.shape[-1:]
    for name, vector in vectors.items():
        if vector is not None and vector.shape != channels:
            raise wrong(op, name, f"{tuple(channels)} for {rows_name} of {tuple(rows.shape)}", vector)


def _check(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor, order: str,
           drop_scale: Tensor | None, gamma: Tensor | None, branch_bias: Tensor | None) -> None:
    op = "residual_norm"
    floating(op, residual, branch, weight, bias, drop_scale, gamma, branch_bias)
    if order not in ORDERS:
        raise ValueError(f"{op}: order={shown(order)}: must be 'pre' or 'post'")
    if order == "post" and gamma is not None:
        raise wrong(op, "gamma", "None with order='post'", gamma)
    if residual is None and order == "pre":
        raise wrong(op, "residual", "a tensor with order='pre'", None)
    if branch is None and order == "post":
        raise wrong(op, "branch", "a tensor with order='post'", None)
    like, name = given(residual, branch), "branch" if residual is None else "residual"
    full = like.shape
    if residual is not None and branch is not None:
        if residual.shape != full:
            raise wrong(op, "branch", f"{tuple(residual.shape)} as residual", branch)
        if residual.dtype != branch.dtype and torch.float64 in (residual.dtype, branch.dtype):
            raise wrong(op, "branch", f"of {str(residual.dtype).removeprefix('torch.')} as residual", branch)
    if len(full) < 2 or not full[-1]:
        raise wrong(op, name, "(B, …, C)", like)
    channels = full[-1:]
    if weight.shape != channels or bias.shape != channels or (gamma is not None and gamma.shape != channels) \
            or (branch_bias is not None and branch_bias.shape != channels):
        _check_vectors(op, like, name, {"weight": weight, "bias": bias, "gamma": gamma, "branch_bias": branch_bias})
    if drop_scale is not None and drop_scale.shape != full[:1]:
        raise wrong(op, "drop_scale", f"{tuple(full[:1])} for {name} of {tuple(full)}", drop_scale)
    if branch is None:
        for other, value in (("drop_scale", drop_scale), ("gamma", gamma), ("branch_bias", branch_bias)):
            if value is not None:
                raise wrong(op, other, "None where branch is None, to which it belongs", value)


def _check_merge(merge: bool, order: str, like: Tensor) -> None:
    if merge is not True:
        raise wrong("residual_norm", "merge", "True or False", merge)
    if order == "pre" or like.ndim != 4 or like.shape[1] % 2 or like.shape[2] % 2:
        raise wrong("residual_norm", "merge", f"False but with order='post' and (B, H, W, C) of even H and W (order is "
                    f"{order!r}, the shape {tuple(like.shape)})", merge)


def _fake(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None,
          drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float, stream_dtype: torch.dtype,
          out_dtype: torch.dtype, merge: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new residual, second result, mean, rstd); a result is empty where :func:`written` says so."""
    like = given(residual, branch)
    own_added, own_out = written(order, branch, stream_dtype, out_dtype)
    rows = like.new_empty(like.numel() // like.shape[-1], dtype=statistics_dtype(like.dtype))
    return (like.new_empty((merged_shape(like) if merge else like.shape) if own_added else (0,), dtype=stream_dtype),
            like.new_empty(like.shape if own_out else (0,), dtype=out_dtype), rows, torch.empty_like(rows))


def _backward_fake(grad_added: Tensor | None, grad_out: Tensor | None, saved: Tensor, branch: Tensor | None,
                   mean: Tensor, rstd: Tensor, weight: Tensor, branch_bias: Tensor | None,
                   drop_scale: Tensor | None, gamma: Tensor | None, order: str, merge: bool,
                   dtype: torch.dtype | None, branch_dtype: torch.dtype | None, impl: str
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """(d residual in ``dtype``, d branch, (2 to 4, C) of d weight, d bias[, d branch_bias][, d gamma]).

    ``saved`` is the branch ("post") or the new residual ("pre"); a dtype is None where forward had no such
    tensor. The first two are empty where :func:`owned` says so.
    """
    own_residual, own_branch = owned(order, merge, grad_out, drop_scale, gamma, dtype, branch_dtype)
    sums = 2 + (branch_bias is not None) + (gamma is not None)
    return (saved.new_empty(saved.shape if own_residual else (0,), dtype=dtype or saved.dtype),
            saved.new_empty(saved.shape if own_branch else (0,), dtype=branch_dtype or saved.dtype),
            saved.new_empty((sums, saved.shape[-1]), dtype=mean.dtype))


def _save(inputs: Any, outputs: Any) -> Any:
    residual, branch, weight, bias, branch_bias, drop_scale, gamma, order, _, _, _, merge, impl = inputs
    added, _, mean, rstd = outputs
    if order == "post":
        saved, kept = branch, None
    else:
        saved, kept = residual if branch is None else added, branch if gamma is not None else None
    dtypes = (weight.dtype, bias.dtype, None if branch_bias is None else branch_bias.dtype,
              None if gamma is None else gamma.dtype)
    settings = (order, merge, None if residual is None else residual.dtype, None if branch is None else branch.dtype,
                impl)
    return (saved, kept, mean, rstd, weight, branch_bias, drop_scale, gamma), (dtypes, settings)


def _gradients(backward: Callable, kept: Kept, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_added, grad_out = grads
    grad_added = None if grad_added is None or not grad_added.numel() else grad_added
    grad_out = None if grad_out is None or not grad_out.numel() else grad_out
    dtypes, (order, merge, dtype, branch_dtype, impl) = kept.settings
    if grad_added is None and grad_out is None:
        return ()
    if merge:
        # One reader is meant.
        grad_added = grad_out if grad_added is None else grad_added if grad_out is None else grad_added + grad_out
        grad_out = None
    elif order == "post" and grad_added is None and grad_out is not None and grad_out.dtype == dtype:
        grad_added, grad_out = grad_out, None
    d_residual, d_branch, sums = backward(grad_added, grad_out, *kept.tensors, order, merge, dtype, branch_dtype, impl)
    drop_scale, gamma = kept.tensors[-2:]
    own_residual, own_branch = owned(order, merge, grad_out, drop_scale, gamma, dtype, branch_dtype)
    d_residual = None if dtype is None else d_residual if own_residual else grad_added
    d_branch = None if branch_dtype is None else d_branch if own_branch else d_residual
    vectors, (_, _, bias_dtype, gamma_dtype) = sums.unbind(), dtypes
    return (d_residual, d_branch, cast(vectors[0], dtypes[0]), cast(vectors[1], dtypes[1]),
            None if bias_dtype is None else cast(vectors[2], bias_dtype), None,
            None if gamma_dtype is None else cast(vectors[-1], gamma_dtype))


def _readers(inputs: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """Two results in every case: an op may not return one tensor twice, or its input."""
    residual, branch, *_, order, _, stream_dtype, out_dtype, _, _ = inputs
    own_added, own_out = written(order, branch, stream_dtype, out_dtype)
    added = outputs[0] if own_added else residual
    return added, outputs[1] if own_out else added


def _reference(residual: Tensor | None, branch: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    weight, *tensors, order, eps, stream_dtype, out_dtype, merge = args
    like = given(residual, branch)
    wide = torch.promote_types(like.dtype if residual is None else residual.dtype, weight.dtype)
    residual = torch.zeros_like(like) if residual is None else residual
    branch = torch.zeros_like(like) if branch is None else branch
    wide = torch.promote_types(wide, branch.dtype)
    widened: list[Any] = [None if t is None else t.to(wide) for t in (residual, branch, weight, *tensors)]
    added, out = reference.residual_norm(*[*widened, order, eps])
    if merge:
        added = out = reference.patch_merge(added)
    return added.to(stream_dtype), out.to(out_dtype)


OP = define_op("residual_norm", on_torch, ".on_triton", reference=_reference, fake=_fake,
               backward_fake=_backward_fake, save=_save, gradients=_gradients, results=2, readers=_readers)
