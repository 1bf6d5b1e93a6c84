"""What a step computes once for all blocks of a Swin encoder: position biases, qkv biases, cast weights, drop paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.common.dispatch import picks_triton
from fastmim_kernels.linear.op import product_dtype

from .layers import DropPaths, relative_position_index

Pair = tuple[int, int]


class Shared(NamedTuple):
    """One block's part; ``low_…`` are copies in the dtype of the products, None where the products cast themselves."""

    bias: Tensor
    """(heads, N, N) additive attention bias."""
    qkv_bias: Tensor | None
    """(3C,)"""
    drop: tuple[Tensor | None, Tensor | None]
    """(B,) factors of stochastic depth for attention and MLP."""
    low_qkv_bias: Tensor | None = None
    low_qkv: Tensor | None = None
    low_proj: Tensor | None = None
    low_fc1: Tensor | None = None
    low_fc2: Tensor | None = None


def relative_coords_table(window_size: Pair, pretrained_window_size: Pair) -> Tensor:
    """((2·wh − 1)(2·ww − 1), 2) log-spaced relative coordinates of SwinV2 (section 3.3, equation 4)."""
    axes = []
    for size, pretrained in zip(window_size, pretrained_window_size, strict=True):
        # A window of one token has the single offset 0.
        r = torch.arange(1 - size, size, dtype=torch.float32, device="cpu") / max((pretrained or size) - 1, 1)
        axes.append(r.sign() * torch.log2(1 + 8 * r.abs()) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


class SharedInputs(nn.Module):
    """Makes the :class:`Shared` of every block. It has buffers of its own and no parameters.

    Args:
        windows, pretrained_windows, depths, num_heads: Of each stage.
        drop_path: Rate of each block.
        dim: Channels of the last stage.
        version: 1 for Swin, 2 for SwinV2.
    """

    zeros: Tensor

    def __init__(
        self,
        *,
        windows: Sequence[Pair],
        pretrained_windows: Sequence[Pair],
        depths: Sequence[int],
        num_heads: Sequence[int],
        drop_path: list[float],
        dim: int,
        version: int,
        impl: str,
    ) -> None:
        super().__init__()
        self.version, self.impl = version, impl
        self.drop_paths = DropPaths(drop_path)
        index = [relative_position_index(window) for window in windows]
        pairs = zip(windows, pretrained_windows, strict=True)
        rows = [(2 * height - 1) * (2 * width - 1) for height, width in windows]
        coords = [relative_coords_table(*pair) for pair in pairs] if version == 2 else None
        plan, self.blocks = fk.bias_plan(index, depths, num_heads, rows, coords)
        for name, tensor in plan._asdict().items():
            self.register_buffer(f"bias_{name}", tensor, persistent=False)
        self._plan: Any = type(plan)
        self.register_buffer("zeros", torch.zeros(dim, device="cpu"), persistent=False)
        self._micro_batch = 0, 1
        self._kept: list[Tensor] | None = None

    def set_micro_batch(self, index: int, count: int) -> None:
        """Say which of how many forward passes between two optimiser steps comes next: weights are cast in the first.

        Without a word, every pass casts them: that a weight has not changed cannot be seen from it, because
        optimisers also write through views of flat buffers.
        """
        self._micro_batch = index, count
        if index == 0:
            self._kept = None

    def forward(self, blocks: Sequence[Any], others: Sequence[Tensor], x: Tensor) -> tuple[list[Shared], list[Any]]:
        """The inputs of each of ``blocks`` for patches x, and low copies of the parameters ``others`` (or None)."""
        biases = self.qkv_biases(blocks)
        low_biases, low_weights, low_others = self.low_copies(blocks, biases, others, x)
        rest = zip(self.drop_paths(x.shape[0]), low_biases, low_weights, strict=True)
        shared = [
            Shared(bias, qkv_bias, drop, low_bias, *low)
            for bias, qkv_bias, (drop, low_bias, low) in zip(self.position_bias(blocks), biases, rest, strict=True)
        ]
        return shared, low_others

    def position_bias(self, blocks: Sequence[Any]) -> list[Tensor]:
        """(heads, N, N) of each block, in one evaluation for all stages."""
        plan = self._plan(*(getattr(self, f"bias_{name}") for name in self._plan._fields))
        params: list[tuple[Tensor, ...]] = []
        for attn in (block.attn for block in blocks):
            if self.version == 1:
                params.append((attn.relative_position_bias_table,))
            else:
                first, _, second = attn.cpb_mlp
                params.append((first.weight, first.bias, second.weight))
        return fk.position_bias(plan, self.blocks, params, impl=self.impl)

    def qkv_biases(self, blocks: Sequence[Any]) -> list[Tensor | None]:
        """(3C,) of each block; SwinV2's keys have none, and one concatenation makes room for it in all blocks."""
        attns = [block.attn for block in blocks]
        if self.version == 1:
            return [attn.qkv.bias for attn in attns]
        if attns[0].q_bias is None:
            return [None] * len(attns)
        parts = [p for a in attns for p in (a.q_bias, self.zeros[: len(a.v_bias)].to(a.v_bias.dtype), a.v_bias)]
        return list(torch.cat(parts).split([3 * a.v_bias.numel() for a in attns]))

    def low_copies(
        self, blocks: Sequence[Any], biases: Sequence[Tensor | None], others: Sequence[Tensor], x: Tensor
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Copies of the qkv biases, of each block's four weights, and of ``others``.

        None, for the products to cast by themselves, on a CPU, without autocast, and where ZeRO-3 has spread the
        weights: a copy of all of them is what it avoids.
        """
        nothing = [None] * len(blocks), [(None,) * 4] * len(blocks), [None] * len(others)
        dtype = product_dtype(x)
        spread = hasattr(blocks[0].norm1.weight, "ds_id")
        casts = others[0].dtype == torch.float32 != dtype
        if not casts or spread or not picks_triton("low_copies", self.impl, x.device):
            return nothing
        given = [b for b in biases if b is not None]
        weights = [w for block in blocks for w in block.weights()]
        copies = iter(self._copies([*given, *weights, *others], dtype))
        low_biases = [None if b is None else next(copies) for b in biases]
        low_weights = [tuple(next(copies) for _ in range(4)) for _ in blocks]
        return low_biases, low_weights, list(copies)

    def _copies(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return fk.low_copies(tensors, dtype, impl=self.impl)
        index, count = self._micro_batch
        copies = self._kept
        if copies is None or index == 0 or copies[0].dtype != dtype:
            copies = fk.low_copies(tensors, dtype, impl=self.impl)
        self._kept = copies if index + 1 < count else None
        return copies
