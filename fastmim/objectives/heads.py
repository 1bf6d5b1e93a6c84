"""What turns tokens into predictions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim_kernels.reference import pixel_shuffle

from ..models import Encoder
from ..models.layers import trunc_normal_
from .view_norm import ViewNorm


def pixel_head(encoder: Encoder) -> nn.Linear:
    """A linear map from a token to its ``stride`` × ``stride`` pixels, C·stride² (SimMIM, section 3.3)."""
    return nn.Linear(encoder.num_features, encoder.stride**2 * encoder.in_chans)


def predict_pixels(tokens: Tensor, head: nn.Linear, stride: int, size: tuple[int, int]) -> Tensor:
    """(B, h, w, D) tokens → (B, C, *size) float32; the far edge of a map that exceeds the image is cut."""
    prediction = pixel_shuffle(F.linear(tokens, head.weight, head.bias), stride)
    return prediction[:, :, : size[0], : size[1]].float()


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

    def forward(self, x: Tensor) -> Tensor:
        """(R, in_dim) → (R, out_dim)."""
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class ProjectionHead(nn.Module):
    """DINO's head (Caron et al. 2021, appendix C): a three-layer MLP, its direction, and its products with prototypes.

    Args:
        in_dim: Of a token.
        out_dim: Prototypes.
        hidden_dim, bottleneck_dim: Of the MLP.
        learn_length: See :class:`Prototypes`.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int, bottleneck_dim: int, learn_length: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = Prototypes(bottleneck_dim, out_dim, learn_length)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02, bound=2.0)
                nn.init.zeros_(layer.bias)

    def directions(self, tokens: Tensor) -> Tensor:
        """(R, in_dim) → (R, bottleneck_dim) of length 1, float32: in half precision short vectors lose theirs."""
        return F.normalize(self.mlp(tokens).float(), dim=-1, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """(R, in_dim) → (R, out_dim) logits, in the dtype of the products."""
        logits: Tensor = self.last_layer(self.directions(tokens))
        return logits


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
