"""The normalised reconstruction target of SimMIM: sliding-window mean and variance.

Microsoft's implementation averages k×k taps at every pixel (2,209 at k = 47). A box filter is separable:
two multiplications by a banded 0/1 matrix give the same sums with a few hundred operations a pixel and
without the cancellation of a summed-area table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.dispatch import resolve

EPS = 1e-6


def local_norm_target(images: Tensor, kernel_size: int, *, impl: str = "auto") -> Tensor:
    """Normalise each pixel by the mean and unbiased variance of its k×k neighbourhood, per channel.

    ``(x − μ) / sqrt(max(var, 0) + 1e-6)`` over the pixels of the window that lie inside the image.
    No gradient flows: it is a target.

    Args:
        images: (B, C, H, W) floating point; computed and returned in float32 (float64 stays float64).
        kernel_size: Odd window edge k in pixels, 3 or more.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: ``kernel_size`` is even or below 3, or ``images`` is not 4-d.
    """
    _check(images, kernel_size)
    images = images.detach()
    images = images if images.dtype == torch.float64 else images.float()
    functions = _FLOAT64 if images.dtype == torch.float64 else _IMPLEMENTATIONS
    function = resolve("local_norm_target", impl, functions, images.device)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return function(images, kernel_size)


def traffic(shape: tuple[int, int, int, int], *, itemsize: int = 4) -> tuple[int, int, int]:
    """Least (bytes read, bytes written, FLOPs) of the two separable passes over (B, C, H, W) images.

    The passes along the rows hand on the sums of x and x²; there is no backward.
    """
    b, c, height, width = shape
    n = b * c * height * width
    return n * itemsize * 2 + n * 8, n * 8 + n * itemsize, 0


def local_statistics(images: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Mean μ and standard deviation sqrt(var + 1e-6) of each pixel's window, shaped as ``images``.

    ``target·std + mean`` undoes :func:`local_norm_target`, which is how predictions are turned back
    into pixels.
    """
    _check(images, kernel_size)
    images = images.detach()
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        centred, pivot = _centre(images if images.dtype == torch.float64 else images.float())
        mean, var = _moments(centred, kernel_size)
        return mean + pivot, (var + EPS).sqrt()


def _check(images: Tensor, kernel_size: int) -> None:
    if images.ndim != 4:
        raise ValueError(f"local_norm_target: images must be (B, C, H, W), got {tuple(images.shape)}")
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: must be odd and at least 3, for example 47")


def _band(size: int, kernel_size: int, like: Tensor) -> Tensor:
    i = torch.arange(size, device=like.device)
    return ((i[:, None] - i[None, :]).abs() <= kernel_size // 2).to(like.dtype)


def _centre(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images minus the first pixel of each plane, and that pixel.

    The variance does not change, and of a flat plane nothing but exact zeros remains to be subtracted.
    """
    pivot = images[..., :1, :1]
    return images - pivot, pivot


def _moments(images: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    b, c, height, width = images.shape
    rows, cols = _band(height, kernel_size, images), _band(width, kernel_size, images)
    count = rows.sum(1)[:, None] * cols.sum(1)[None, :]
    # x and x² share each product: one tall one along the rows, one batched one along the columns.
    both = torch.stack((images, images.square())).reshape(-1, width) @ cols
    sums = (rows @ both.reshape(-1, height, width)).reshape(2, b, c, height, width).div_(count)
    mean, var = sums
    var.addcmul_(mean, mean, value=-1).mul_(count / (count - 1).clamp_(min=1)).clamp_(min=0)
    return mean, var


@torch.library.custom_op("fastmim::local_norm_target", mutates_args=())
def _op(images: Tensor, kernel_size: int, impl: str) -> Tensor:
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.forward(images.contiguous(), kernel_size)
    centred, _ = _centre(images)
    mean, var = _moments(centred, kernel_size)
    return centred.sub_(mean).mul_(var.add_(EPS).rsqrt_()).contiguous()


@_op.register_fake
def _(images: Tensor, kernel_size: int, impl: str) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


# Running sums need no matrix product; the banded ones of the torch implementation are its own affair.
@register_flop_formula(torch.ops.fastmim.local_norm_target)
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def _torch(images: Tensor, kernel_size: int) -> Tensor:
    return _op(images, kernel_size, "torch")


def _triton(images: Tensor, kernel_size: int) -> Tensor:
    return _op(images, kernel_size, "triton")


_FLOAT64 = {"torch": _torch, "reference": reference.local_norm_target}
_IMPLEMENTATIONS = {**_FLOAT64, "triton": _triton}
