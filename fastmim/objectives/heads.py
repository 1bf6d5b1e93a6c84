"""Heads of self-distillation and contrast: what turns tokens into codes and features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.common.dispatch import picks_triton
from fastmim_kernels.common.rows import cast, statistics_dtype

from ..models.layers import trunc_normal_
from .view_norm import ViewNorm


class Prototypes(nn.Module):
    """``out_dim`` directions, each of its own length g: a linear layer without bias, weight-normalised.

    Salimans & Kingma 2016 (equation 2): w = g·v/‖v‖, on the names of torch's ``weight_norm``.

    Args:
        learn_length: Train g, which starts at 1.
    """

    def __init__(self, in_dim: int, out_dim: int, learn_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=learn_length)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, *parts: Tensor) -> list[Tensor]:
        """(R, out_dim) for each part (R, in_dim), all with the weight that is normalised once."""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return [F.linear(part, weight) for part in parts]


class HeadMlp(nn.Sequential):
    """Linear – GELU – Linear – GELU – Linear with the fused ops, on the names of the plain sequence."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, impl: str) -> None:
        widths = ((in_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, out_dim))
        first, second, third = (nn.Linear(*width) for width in widths)
        super().__init__(first, nn.GELU(), second, nn.GELU(), third)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """(R, in_dim) → (R, out_dim)."""
        if not picks_triton("mlp", self.impl, x.device):
            out: Tensor = super().forward(x)  # a CPU would compute activations again for as long as it saves
            return out
        layers: list[Any] = list(self)
        first, second, third = layers[::2]
        x = fk.mlp(x, first.weight, first.bias, second.weight, None, impl=self.impl)
        return fk.linear(fk.gelu(x, second.bias, impl=self.impl), third.weight, third.bias, impl=self.impl)


class ProjectionHead(nn.Module):
    """DINO's head (Caron et al. 2021, appendix C): a three-layer MLP, its direction, and its products with prototypes.

    Args:
        in_dim: Of a token.
        out_dim: Prototypes.
        hidden_dim, bottleneck_dim: Of the MLP.
        learn_length: See :class:`Prototypes`.
        impl: Implementation of the ops.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        learn_length: bool,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.mlp = HeadMlp(in_dim, hidden_dim, bottleneck_dim, impl)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, learn_length)
        self.register_module("last_layer2", None)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02, bound=2.0)
                nn.init.zeros_(layer.bias)

    def separate_patches(self, out_dim: int) -> None:
        """Give patches prototypes of their own, under iBOT's name for them."""
        first = self.last_layer
        self.last_layer2 = Prototypes(first.weight_v.shape[1], out_dim, first.weight_g.requires_grad)

    def directions(self, tokens: Tensor) -> Tensor:
        """(R, in_dim) → (R, bottleneck_dim) of length 1, float32: in half precision short vectors lose theirs."""
        out: Tensor = self.mlp(tokens)
        return F.normalize(cast(out, statistics_dtype(out.dtype)), dim=-1, eps=1e-12)

    def logits(self, classes: Tensor, patches: Tensor) -> list[Tensor]:
        """(R, out_dim) and (Q, out_dim of patches) of the directions of class tokens and of patches.

        Two products: the gradients of slices of one result would be padded to all of it.
        """
        if self.last_layer2 is None:
            return self.last_layer(classes, patches)
        return [*self.last_layer(classes), *self.last_layer2(patches)]

    def prototypes(self) -> Iterator[nn.Parameter]:
        """Parameters of the last layers."""
        for layer in (self.last_layer, self.last_layer2):
            yield from () if layer is None else layer.parameters()


def norm_mlp(widths: Sequence[int]) -> nn.Sequential:
    """MoCo v3's MLP (Chen et al. 2021, section 4) of (V, B, widths[0]) rows: linear layers without bias.

    Behind each a :class:`.ViewNorm`, then ReLU; behind the last one the norm alone, without scale and shift.
    """
    layers: list[nn.Module] = []
    for i, (wide, out) in enumerate(pairwise(widths), start=1):
        last = i == len(widths) - 1
        layers += [nn.Linear(wide, out, bias=False), ViewNorm(out, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)
