"""The parts that the drop-in blocks are made of: residual norm, stochastic depth, the MLP."""

from __future__ import annotations

from typing import Any, TypeVar

import timm.layers
import torch
from torch import Tensor, nn

from ..common.dispatch import check_impl, no_triton
from ..fusion import norm_adds_bias
from ..linear.op import product_dtype
from ..mlp.op import mlp
from ..residual_norm.op import residual_norm
from . import rules

D = TypeVar("D", bound="DropIn")


class DropIn(nn.Module):
    """Mixed into a subclass of a timm module that differs from it in ``forward`` alone.

    ``rule`` and ``dropout`` are also asked of timm's module before it becomes a drop-in.
    """

    impl = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settle(impl)

    def settle(self, impl: str) -> None:
        """Take ``impl``, and what is to be prepared; children become drop-ins too."""
        self.impl = check_impl(impl)

    def rule(self) -> str:
        """Why the kernels must not compute this module; empty when they may."""
        raise NotImplementedError

    def dropout(self) -> str:
        """Why they must not in training."""
        return ""

    def as_timm(self) -> bool:
        """Whether timm's own forward is to run. It also does for ``torch.jit.trace``, which cannot hold the ops."""
        return torch.jit.is_tracing() or bool((self.training and self.dropout()) or self.rule())


def adopt(module: nn.Module, kind: type[D], impl: str) -> D:
    """Make ``module`` one of ``kind``, a subclass of its class: the same object, parameters, buffers and hooks."""
    module.__class__ = kind
    assert isinstance(module, kind)
    module.settle(impl)
    return module


class ResidualNorm(nn.LayerNorm):
    """A LayerNorm with the residual addition before it ("pre": Swin, ViT) or after it ("post": SwinV2).

    Args:
        dim: C.
        order, eps: As of :func:`fastmim_kernels.residual_norm`.
        impl: Of the op.
    """

    def __init__(self, dim: int, *, order: str = "pre", eps: float = 1e-5, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(dim, eps=eps, **kwargs)
        self.order, self.impl = order, check_impl(impl)

    def forward(self, residual: Tensor, branch: Tensor | None = None, **options: Any  # type: ignore[override]
                ) -> tuple[Tensor, Tensor]:
        """(new stream, what the next product reads), see :func:`fastmim_kernels.residual_norm`."""
        return add_and_norm(self, residual, branch, self.order, self.impl, **options)


def add_and_norm(norm: nn.LayerNorm, residual: Tensor, branch: Tensor | None, order: str, impl: str, **options: Any
                 ) -> tuple[Tensor, Tensor]:
    """:func:`fastmim_kernels.residual_norm` with the parameters of ``norm``."""
    return residual_norm(residual, branch, norm.weight, norm.bias, order=order, eps=norm.eps, impl=impl, **options)


def drop_scale(path: nn.Module, branch: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B,) factors of stochastic depth, drawn as timm's DropPath draws them for a branch in ``dtype``."""
    rate = getattr(path, "drop_prob", None)
    if not rate or not path.training:
        return None
    scale = branch.new_empty(len(branch), dtype=dtype).bernoulli_(1 - rate)
    return scale.div_(1 - rate) if rate < 1 and path.scale_by_keep else scale


def normed_dtype(x: Tensor) -> torch.dtype:
    """Of torch's LayerNorm of x: autocast runs it in float32 on a GPU, and leaves it alone on a CPU."""
    device = x.device.type
    wide = torch.is_autocast_enabled(device) and (device != "cpu" or not no_triton(x.device))
    return torch.promote_types(x.dtype, torch.float32) if wide else x.dtype


class Mlp(DropIn, timm.layers.Mlp):
    """timm's ``Mlp``: linear, exact GELU, linear, of which backward keeps the input and the pre-activation."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, D)."""
        if self.as_timm():
            return super().forward(x)
        return self._product(x, self.fc2.bias)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result, and the bias of ``fc2`` where the residual norm is still to add it."""
        if not norm_adds_bias(self.impl, x.device, product_dtype(x)) or rules.hooked(self) or self.as_timm():
            return self(x), None
        return self._product(x, None), self.fc2.bias

    def rule(self) -> str:
        return rules.mlp(self)

    def dropout(self) -> str:
        return rules.dropout(self.drop1, self.drop2)

    def _product(self, x: Tensor, bias2: Tensor | None) -> Tensor:
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, bias2, impl=self.impl)


def mlp_branch(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """:meth:`Mlp.branch` of whatever MLP a block has."""
    return module.branch(x) if isinstance(module, Mlp) else (module(x), None)


def adopt_mlp(block: nn.Module, impl: str) -> None:
    """Of a block, if a drop-in fits."""
    if type(block.mlp) in (timm.layers.Mlp, Mlp) and not rules.mlp(block.mlp):
        adopt(block.mlp, Mlp, impl)
