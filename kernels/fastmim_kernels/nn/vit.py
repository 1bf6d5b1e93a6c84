"""timm's ViT block on the kernels: additions, LayerScale and norms in one pass, and the MLP."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from . import rules
from .parts import DropIn, add_and_norm, adopt_mlp, drop_scale


class VitBlock(DropIn, vit.Block):
    """timm's ``vision_transformer.Block`` with whatever attention and MLP it has; arguments are timm's, and ``impl``.

    torch's ``scaled_dot_product_attention`` is the kernel of ViT's attention already.
    """

    def settle(self, impl: str) -> None:
        super().settle(impl)
        adopt_mlp(self, impl)

    def rule(self) -> str:
        return rules.residuals(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, C) → (B, N, C); more arguments are the attention's."""
        if self.as_timm():
            return super().forward(x, *args, **kwargs)
        x, y = add_and_norm(self.norm1, x, None, "pre", self.impl)
        branch = self.attn(y, *args, **kwargs)
        gamma = _gamma(self.ls1)
        dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
        x, y = add_and_norm(self.norm2, x.to(torch.promote_types(x.dtype, dtype)), branch, "pre", self.impl,
                            gamma=gamma, drop_scale=drop_scale(self.drop_path1, branch, dtype))
        return x + self.drop_path2(self.ls2(self.mlp(y)))


def _gamma(scale: nn.Module) -> Tensor | None:
    return getattr(scale, "gamma", None)
