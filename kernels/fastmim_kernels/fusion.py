"""What one op takes over from another, on the implementation that runs: asked once a step, by the encoder.

A model learns here all that it needs to know of implementations, so that its blocks need not ask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .common.arguments import explained
from .common.direct import unwatched
from .common.dispatch import check_impl, picks_triton


class Fusion(NamedTuple):
    """Who casts, who adds a bias, who adds gradients. The default: every op does its own work."""

    norm_adds_bias: bool = False
    """``residual_norm`` adds the bias of the product before it, and has its gradient nearly for free. On a CPU the
    product adds it for less."""
    product_adds_gradients: bool = False
    """A product that reads the residual stream hands it on to the next reader, and adds the gradients of both."""
    casts_once: bool = False
    """``low_copies`` casts the weights of all products once a step, which else cast their own."""
    one_node: bool = False
    """A branch and the norm behind it are one node of autograd, see :mod:`.branches`: less work for the host of a GPU.
    Elsewhere the work is the ops' own, and what they keep is let go one by one."""


def norm_adds_bias(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Of :class:`Fusion`, for who needs no more."""
    return picks_triton("residual_norm", impl, device, dtype)


@explained()
def fusion(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Fusion:
    """The plan for ops of ``impl`` on ``device`` whose products are in ``dtype``."""
    check_impl(impl)
    in_norm = norm_adds_bias(impl, device, dtype)
    return Fusion(in_norm, in_norm, picks_triton("low_copies", impl, device, dtype), in_norm and not is_compiling())


@explained(data="any")
def shape_may_follow(data: Tensor) -> bool:
    """Whether a shape may depend on the values of ``data``: on a CPU, without a compiler, fake tensors or torch.func.

    Elsewhere the host would wait for the device, and what is traced must hold for other values.
    """
    return data.is_cpu and unwatched((data,)) and not torch._C._are_functorch_transforms_active()
