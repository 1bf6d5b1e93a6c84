"""Patch merging: four neighbouring tokens become one of 4C channels (Swin, section 3.1), normalised or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast, shortcut, shortcut_with_grad
from ..common.dispatch import resolve
from ..common.rows import layer_norm, layer_norm_backward, refuse_float64, statistics_dtype


def patch_merge(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5,
                out_dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """Gather 2×2 neighbourhoods, (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 4C), and normalise them where asked to.

    Channel order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), as in Microsoft's weights. An odd edge is
    padded with zeros. The gathered map is never kept: backward reads x again, or nothing without a norm.

    Args:
        x: (B, H, W, C) floating point.
        weight, bias: (4C,) of a LayerNorm over the merged channels (Swin); None for none (SwinV2).
        eps: Of the LayerNorm.
        out_dtype: Of the result, which a matrix product reads. Default: autocast's where it is on, else that
            of x.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: x is not 4-d, or weight and bias are not both (4C,) or both None.
    """
    if x.ndim != 4:
        raise ValueError(f"patch_merge: x must be (B, H, W, C), got {tuple(x.shape)}")
    width = (4 * x.shape[-1],)
    if (weight is None) != (bias is None) or any(p is not None and p.shape != width for p in (weight, bias)):
        raise ValueError(f"patch_merge: weight and bias must both be {width} or both be None, got "
                         f"{[None if p is None else tuple(p.shape) for p in (weight, bias)]}")
    device = x.device.type
    if out_dtype is None:
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    function = resolve("patch_merge", impl, _IMPLEMENTATIONS, x.device)
    with torch.autocast(device, enabled=False):
        return function(x, weight, bias, eps, out_dtype)


def traffic(shape: tuple[int, int, int, int], *, norm: bool, itemsize: int = 2, out_itemsize: int = 2,
            param_itemsize: int = 4) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Args:
        shape: (B, H, W, C) of x.
        norm: With LayerNorm.
        itemsize, out_itemsize, param_itemsize: Bytes of a value of x, of the result, of a parameter.
    """
    b, h, w, c = shape
    rows = b * ((h + 1) // 2) * ((w + 1) // 2)
    n, out = b * h * w * c * itemsize, rows * 4 * c * out_itemsize
    forward = (n + norm * 8 * c * param_itemsize, out + norm * 8 * rows, 0)
    return forward, (out + norm * (n + 8 * rows + 4 * c * param_itemsize), n + norm * 32 * c, 0)


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, impl: str
             ) -> tuple[Tensor, Tensor, Tensor]:
    """(merged, mean, rstd); the statistics are empty without a norm."""
    x = x.contiguous()
    if impl == "triton":
        from . import on_triton as kernels
        refuse_float64("patch_merge", x)
        return kernels.forward(x, weight, bias, eps, out_dtype)
    if weight is None or bias is None:
        absent = x.new_empty(0, dtype=statistics_dtype(x.dtype))
        return gather(x, out_dtype), absent, absent.clone()
    out, mean, rstd = layer_norm(gather(x, x.dtype), weight, bias, eps)
    return out.to(out_dtype), mean, rstd


_op = torch.library.custom_op("fastmim::patch_merge", _forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, impl: str
      ) -> tuple[Tensor, Tensor, Tensor]:
    b, h, w, c = x.shape
    out = x.new_empty((b, (h + 1) // 2, (w + 1) // 2, 4 * c), dtype=out_dtype)
    mean = x.new_empty(0 if weight is None else out.numel() // (4 * c), dtype=statistics_dtype(x.dtype))
    return out, mean, torch.empty_like(mean)


def gather(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh (B, ⌈H/2⌉, ⌈W/2⌉, 4C) in ``dtype``; the cast costs no pass of its own."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2)) if x.shape[1] % 2 or x.shape[2] % 2 else x
    b, h, w, c = x.shape
    out = x.new_empty((b, h // 2, w // 2, 2, 2, c), dtype=dtype)
    return out.copy_(x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)).flatten(3)


def scatter(merged: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`gather`."""
    b, h, w, c = merged.shape
    x = merged.new_empty((b, h, 2, w, 2, c // 4), dtype=dtype)
    x.copy_(merged.view(b, h, w, 2, 2, c // 4).permute(0, 1, 4, 2, 3, 5))
    return x.view(b, 2 * h, 2 * w, c // 4)[:, :height, :width].contiguous()


def _backward(grad: Tensor, x: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None,
              height: int, width: int, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    """(d x in ``dtype``, (2, 4C) of d weight and d bias, empty without a norm)."""
    grad = grad.contiguous()
    x = None if x is None else x.contiguous()
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.backward(grad, x, mean, rstd, weight, height, width, dtype)
    sums = mean.new_empty(0)
    if weight is not None and x is not None:
        grad, sums = layer_norm_backward(grad, gather(x, dtype), mean, rstd, weight)
    return scatter(grad, height, width, dtype), sums


_backward_op = torch.library.custom_op("fastmim::patch_merge_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None, height: int,
      width: int, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    dx = grad.new_empty((grad.shape[0], height, width, grad.shape[-1] // 4), dtype=dtype)
    return dx, mean.new_empty((0,) if weight is None else (2, grad.shape[-1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _, _, impl = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if weight is not None else None, mean, rstd, weight)
    ctx.settings = x.shape[1], x.shape[2], x.dtype, impl
    ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]


@outside_autocast
def _autograd(ctx, grad, _mean, _rstd):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    dx, sums = _run_backward(grad, *ctx.saved_tensors, *ctx.settings)
    norm = ctx.dtypes[0] is not None
    d_params = [s.to(dtype) for s, dtype in zip(sums, ctx.dtypes, strict=True)] if norm else [None, None]
    return dx, *d_params, None, None, None


torch.library.register_autograd("fastmim::patch_merge", _autograd, setup_context=_setup_context)
_run_op = shortcut_with_grad(_op, _forward, _setup_context, _autograd)
_run_backward = shortcut(_backward_op, _backward)


# No matrix product inside; torch's counter counts nothing else either.
@register_flop_formula([torch.ops.fastmim.patch_merge, torch.ops.fastmim.patch_merge_backward])
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def _run(*args, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
    return _run_op(*args, impl)[0]


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
               ) -> Tensor:
    if weight is None or bias is None:
        return reference.patch_merge(x).to(out_dtype)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return reference.patch_merge_norm(x.to(wide), weight.to(wide), bias.to(wide), eps).to(out_dtype)


_IMPLEMENTATIONS: dict[str, Callable] = {"torch": partial(_run, impl="torch"), "triton": partial(_run, impl="triton"),
                    "reference": _reference}
