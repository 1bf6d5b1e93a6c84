"""What a step computes once for all blocks of a Swin encoder: position biases, qkv biases, cast weights, drop paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.common.direct import check_whole
from fastmim_kernels.linear.op import product_dtype

from .layers import DropPaths, relative_position_index
from .stream import Step, weight_and_bias

Pair = tuple[int, int]


def relative_coords_table(window_size: Pair, pretrained_window_size: Pair) -> Tensor:
    """((2·wh − 1)(2·ww − 1), 2) log-spaced relative coordinates of SwinV2 (section 3.3, equation 4)."""
    axes = []
    for size, pretrained in zip(window_size, pretrained_window_size, strict=True):
        # A window of one token has the single offset 0.
        r = torch.arange(1 - size, size, dtype=torch.float32, device="cpu") / max((pretrained or size) - 1, 1)
        axes.append(r.sign() * torch.log2(1 + 8 * r.abs()) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


class SharedInputs(nn.Module):
    """Makes the :class:`.Step` of every block. It has buffers of its own and no parameters.

    Args:
        windows, depths, num_heads: Of each stage.
        coordinates: Of each stage (entries, 2) for an MLP of position biases; None for tables.
        drop_path: Rate of each block.
        dim: Channels of the last stage.
    """

    zeros: Tensor

    def __init__(
        self,
        windows: Sequence[Pair],
        depths: Sequence[int],
        num_heads: Sequence[int],
        coordinates: list[Tensor] | None,
        drop_path: list[float],
        dim: int,
        impl: str,
    ) -> None:
        super().__init__()
        self.impl = impl
        self.drop_paths = DropPaths(drop_path)
        index = [relative_position_index(window) for window in windows]
        rows = [(2 * height - 1) * (2 * width - 1) for height, width in windows]
        plan, self.blocks = fk.bias_plan(index, depths, num_heads, rows, coordinates)
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

    def forward(
        self, blocks: Sequence[Any], others: Sequence[Tensor], x: Tensor
    ) -> tuple[list[Step], list[Tensor | None]]:
        """The inputs of each of ``blocks`` for patches x, and low copies of the parameters ``others`` (or None)."""
        check_whole([blocks[0].norm1.weight])
        dtype, attns = product_dtype(x), [block.attn for block in blocks]
        fusion = fk.fusion(self.impl, x.device, dtype)
        casts = fusion.casts_once and self.casts(blocks, others, dtype)
        made, low_made = self.qkv_biases(attns, casts, dtype)
        copies = iter(self.low_copies(blocks, others, dtype) if casts else [None] * (len(others) + 5 * len(blocks)))
        low_others = [next(copies) for _ in others]
        drops = self.drop_paths(x.shape[0])
        biases = self.position_bias(attns)
        # Parameters are read where they are used: ZeRO-3 takes them apart again in between.
        steps = []
        for bias, (attn, mlp), qkv_bias, low_bias in zip(biases, drops, made, low_made, strict=True):
            own_low, *low = islice(copies, 5)
            steps.append(Step(self.impl, fusion, bias, attn, mlp, qkv_bias, own_low if low_bias is None else low_bias,
                              *low))  # fmt: skip
        return steps, low_others

    def position_bias(self, attns: Sequence[Any]) -> list[Tensor]:
        """(heads, N, N) of each block, in one evaluation for all stages."""
        plan = self._plan(*(getattr(self, f"bias_{name}") for name in self._plan._fields))
        return fk.position_bias(plan, self.blocks, [attn.bias_parameters() for attn in attns], impl=self.impl)

    def qkv_biases(
        self, attns: Sequence[Any], casts: bool, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """(3C,) of each block, and with ``casts`` the same in ``dtype``; None where the projection has its own.

        SwinV2's keys have none: one concatenation makes room for it in all blocks. Its place in memory is another one
        in every step, so that no table of :func:`fastmim_kernels.low_copies` may hold it.
        """
        none = [None] * len(attns)
        if getattr(attns[0], "q_bias", None) is None:
            return none, none
        own = [(attn.q_bias, attn.v_bias) for attn in attns]
        sizes = [3 * v.numel() for _, v in own]
        zeros = {size: self.zeros[: size // 3].to(own[0][1].dtype) for size in set(sizes)}
        flat = torch.cat([part for (q, v), size in zip(own, sizes, strict=True) for part in (q, zeros[size], v)])
        # Products read vectors of 16 bytes.
        casts = casts and flat.dtype != dtype and not any(size % 8 for size in sizes)
        return flat.split(sizes), flat.detach().to(dtype).split(sizes) if casts else none

    def casts(self, blocks: Sequence[Any], others: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether all weights are cast at once to the dtype of the products.

        Not without autocast, nor where ZeRO-3 has spread the weights, since a copy of all of them is what it avoids:
        the products then cast by themselves.
        """
        return others[0].dtype == torch.float32 != dtype and not hasattr(blocks[0].norm1.weight, "ds_id")

    def low_copies(self, blocks: Sequence[Any], others: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor | None]:
        """Copies of ``others`` and of each block's qkv bias, if it is a parameter, and its four weights."""
        tensors: list[Tensor | None] = [*others]
        for block in blocks:
            tensors += (weight_and_bias(block.attn._modules["qkv"])[1], *block.weights())
        copies = iter(self._copies([t for t in tensors if t is not None], dtype))
        return [None if t is None else next(copies) for t in tensors]

    def _copies(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return fk.low_copies(tensors, dtype, impl=self.impl)
        index, count = self._micro_batch
        copies = self._kept
        if copies is None or index == 0 or copies[0].dtype != dtype:
            copies = fk.low_copies(tensors, dtype, impl=self.impl)
        self._kept = copies if index + 1 < count else None
        return copies
