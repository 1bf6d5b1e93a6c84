"""Building blocks shared by the encoders. Token maps are channels-last: (B, H, W, C) or (B, L, C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.branches import Branch
from fastmim_kernels.branches import mlp as mlp_branch
from fastmim_kernels.linear.op import product_dtype

from .stream import Step


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

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm: bool, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.project(self.patches(images)))

    def patches(self, images: Tensor) -> Tensor:
        """(B, H/p, W/p, C·p²) in the dtype of the products, in one pass."""
        b, c, height, width = images.shape
        p = self.patch_size
        cut = images.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = cut.new_empty(cut.shape, dtype=product_dtype(images))
        return patches.copy_(cut).flatten(3)

    def project(self, patches: Tensor, low_weight: Tensor | None = None, low_bias: Tensor | None = None) -> Tensor:
        """The tokens before their norm."""
        weight, bias = self.proj.weight.flatten(1), self.proj.bias
        return fk.linear(patches, weight, bias, low_weight=low_weight, low_bias=low_bias, impl=self.impl)


class Mlp(nn.Module):
    """Linear – exact GELU – Linear; backward computes the activation again instead of keeping it."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.recompute_fc1 = False
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, y: Tensor, *, step: Step, stream: Tensor | None = None) -> Any:
        """(…, C) → (…, C), without the bias of ``fc2`` where ``step`` leaves it to the next norm.

        (result, y), where the product adds the gradient of the other reader of ``stream``, which y is too.
        """
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, step.product_bias(self.fc2)
        how = {"low_weight1": step.low_fc1, "low_weight2": step.low_fc2, "recompute_fc1": self.recompute_fc1}
        if step.hands_on(y, stream):
            return fk.mlp_and_input(y, *weights, **how, impl=step.impl)
        return fk.mlp(y, *weights, **how, impl=step.impl)

    def branch(self, y: Tensor, step: Step) -> Branch:
        """What :meth:`forward` makes of y, to be run with the norm behind it."""
        fc1, fc2 = self.fc1, self.fc2
        weights = fc1.weight, fc1.bias, fc2.weight, step.product_bias(fc2), step.low_fc1, step.low_fc2
        return mlp_branch(*weights, self.recompute_fc1)


class DropPaths(nn.Module):
    """Stochastic depth (Huang et al. 2016) of all blocks: each sample's factor, 0 or 1/keep, for ``residual_norm``.

    Every branch of every block has its own independent draw for every sample; they come from one call of the
    generator a step, because a call each would be two per cent of all launches.

    Args:
        rates: Of each block, which has two branches.
    """

    keep: Tensor

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        self.rates = rates
        keep = [1 - rate for rate in rates for _ in range(2) if rate]
        self.register_buffer("keep", torch.tensor(keep, device="cpu").unsqueeze(1), persistent=False)

    def forward(self, batch: int) -> list[tuple[Tensor | None, Tensor | None]]:
        """(B,) float32 factors of both branches of each block; None where nothing is dropped."""
        if not self.training or not any(self.rates):
            return [(None, None)] * len(self.rates)
        factors = torch.rand(len(self.keep), batch, device=self.keep.device).lt(self.keep) / self.keep
        drawn = iter(factors.unbind(0))
        return [(next(drawn), next(drawn)) if rate else (None, None) for rate in self.rates]

    def extra_repr(self) -> str:
        return f"rates={[round(rate, 4) for rate in self.rates]}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The linear schedule 0 … rate over ``depth`` blocks.

    Raises:
        ValueError: ``rate`` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate={rate}: must lie in [0, 1)")
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """(N, N) int64: which of the (2·wh − 1)(2·ww − 1) relative offsets separates query i and key j."""
    wh, ww = window_size
    rows = torch.arange(wh, device="cpu").repeat_interleave(ww)
    cols = torch.arange(ww, device="cpu").repeat(wh)
    d_rows = rows[:, None] - rows[None, :] + wh - 1
    d_cols = cols[:, None] - cols[None, :] + ww - 1
    return d_rows * (2 * ww - 1) + d_cols
