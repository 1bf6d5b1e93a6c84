"""The normalised reconstruction target of SimMIM: sliding-window mean and variance.

Microsoft's implementation averages k×k taps at every pixel (2,209 at k = 47). A box filter is separable, and no
implementation here needs more than a few hundred operations a pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import explained, floating, whole, wrong
from ..common.define_op import define_op
from . import on_torch
from .on_torch import EPS, centre, moments


@explained()
def local_norm_target(images: Tensor, kernel_size: int, *, impl: str = "auto") -> Tensor:
    """Normalise each pixel by the mean and unbiased variance of its k×k neighbourhood, per channel.

    ``(x − μ) / sqrt(max(var, 0) + 1e-6)`` over the pixels of the window that lie inside the image.
    No gradient flows: it is a target.

    Args:
        images: (B, C, H, W) floating point; computed and returned in float32 (float64 stays float64).
        kernel_size: Odd window edge k in pixels, 3 or more.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: An argument is not what is said here.
    """
    kernel_size = whole(kernel_size)
    _check(images, kernel_size)
    images = images.detach()
    images = images if images.dtype == torch.float64 else images.float()
    return OP(images, kernel_size, impl=impl)


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
    kernel_size = whole(kernel_size)
    _check(images, kernel_size)
    images = images.detach()
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        centred, pivot = centre(images if images.dtype == torch.float64 else images.float())
        mean, var = moments(centred, kernel_size)
        return mean + pivot, (var + EPS).sqrt()


def _check(images: Tensor, kernel_size: int) -> None:
    floating("local_norm_target", images)
    if images.ndim != 4:
        raise wrong("local_norm_target", "images", "(B, C, H, W)", images)
    # NaN is neither below 3 nor even.
    if not isinstance(kernel_size, int | torch.SymInt) or kernel_size < 3 or kernel_size % 2 == 0:
        raise wrong("local_norm_target", "kernel_size", "odd and at least 3, for example 47", kernel_size)


def _fake(images: Tensor, kernel_size: int, impl: str) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


OP = define_op("local_norm_target", on_torch, ".on_triton", reference=reference.local_norm_target, fake=_fake)
