"""Building blocks shared by the encoders. Token maps are channels-last: (B, H, W, C) or (B, L, C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk


def to_pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """``7`` → ``(7, 7)``; a pair of integers is returned as a tuple.

    Raises:
        ValueError: Not an integer or a pair, or not positive.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
        raise ValueError(f"{name}={value!r}: must be a positive integer or a pair of them (rows, columns)")
    return pair[0], pair[1]


def trunc_normal_(tensor: Tensor, std: float, bound: float) -> None:
    """Fill with a normal of the given std truncated at ±bound, in place.

    timm's, imported at use because it loads all of timm. torch's own draws until a value fits, which needs a
    host synchronisation and cannot be traced on fake tensors.
    """
    from timm.layers import trunc_normal_ as timm_trunc_normal_

    timm_trunc_normal_(tensor, std=std, a=-bound, b=bound)


class PatchEmbed(nn.Module):
    """Non-overlapping patch projection: (B, C, H, W) → (B, H/p, W/p, embed_dim).

    ``proj`` holds a convolution's weights under timm's name; with stride = kernel it is one matrix product
    over patches, which also leaves the tokens channels-last.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.project(images))

    def project(self, images: Tensor) -> Tensor:
        """The tokens before their norm."""
        b, c, height, width = images.shape
        p = self.patch_size
        patches = images.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Mlp(nn.Module):
    """Linear – exact GELU – Linear; backward computes the activation again instead of keeping it."""

    def __init__(self, dim: int, hidden_dim: int, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.recompute_fc1 = False
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return fk.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, recompute_fc1=self.recompute_fc1, impl=self.impl)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): yields each sample's factor, 0 or 1/keep, for ``residual_norm``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """(B,) float32 factors for the samples of ``x``; None when nothing is dropped."""
        if self.rate == 0 or not self.training:
            return None
        keep = 1 - self.rate
        return torch.rand(x.shape[0], device=x.device).lt(keep).float().div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The linear schedule 0 … rate over ``depth`` blocks.

    Raises:
        ValueError: ``rate`` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate={rate}: must lie in [0, 1)")
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def joint_bias(q_bias: Tensor | None, v_bias: Tensor | None) -> Tensor | None:
    """(3C,) bias of the fused qkv projection of BEiT and SwinV2, whose keys have none."""
    if q_bias is None or v_bias is None:
        return None
    return torch.cat((q_bias, torch.zeros_like(v_bias), v_bias))


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """(N, N) int64: which of the (2·wh − 1)(2·ww − 1) relative offsets separates query i and key j."""
    wh, ww = window_size
    rows = torch.arange(wh, device="cpu").repeat_interleave(ww)
    cols = torch.arange(ww, device="cpu").repeat(wh)
    d_rows = rows[:, None] - rows[None, :] + wh - 1
    d_cols = cols[:, None] - cols[None, :] + ww - 1
    return d_rows * (2 * ww - 1) + d_cols
