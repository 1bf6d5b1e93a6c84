"""Grids of the largest inputs: CUDA allows 2³¹ − 1 programs along x, but 65,535 along y and z."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.runtime.interpreter import InterpretedFunction

from fastmim_kernels.common import arrival
from fastmim_kernels.distillation import on_triton as distillation
from fastmim_kernels.linear.product_add import product_add
from fastmim_kernels.linear.weight_gradient import weight_gradient
from fastmim_kernels.local_norm import on_triton as local_norm
from fastmim_kernels.mask_tokens import on_triton as mask_tokens
from fastmim_kernels.masked_loss import linear_on_triton as linear_loss
from fastmim_kernels.masked_loss import on_triton as masked_loss
from fastmim_kernels.mlp import gelu_on_triton as gelu
from fastmim_kernels.mlp import on_triton as mlp
from fastmim_kernels.patch_merge import on_triton as patch_merge
from fastmim_kernels.position_bias import on_triton as position_bias
from fastmim_kernels.position_bias.layout import Block
from fastmim_kernels.residual_norm import on_triton as residual_norm
from fastmim_kernels.unshuffle import on_triton as unshuffle
from fastmim_kernels.window_attention import triton_backward, triton_forward

F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def image_loss(tokens: int) -> tuple[Any, ...]:
    return empty(tokens, 3, 16, 16, dtype=F32), empty(tokens, 1, 1, dtype=torch.bool), None, None, 16, "l1"


def bias(forward: bool) -> object:
    # SwinV2 on 1,024 pixels, one window of all 64x64 tokens in each of 100 blocks: N² is 65,536 times 256.
    blocks = [Block(64, 127**2, 64**4, 0, 0, 0, 0, 0, 0)] * 100
    flat, table = empty(1 << 20, dtype=F32), empty(100, 9, dtype=I64)
    layout = [value for block in blocks for value in block]
    if forward:
        return position_bias.forward(flat, flat, flat, flat, flat, table, layout, 512)
    return position_bias.backward(flat, flat, flat, flat, flat, flat, flat, table, layout, 512)


def norm(forward: bool, rows: int = 2**24, c: int = 8192) -> object:
    x, vector = empty(64, rows // 64, c), empty(c, dtype=F32)
    if forward:
        return residual_norm.forward(None, x, vector, vector, None, None, None, "post", 1e-5, BF16, BF16, False)
    rows_of = empty(rows, dtype=F32)
    return residual_norm.backward(x, None, x, None, rows_of, rows_of, vector, None, None, None, "post", False, None,
                                  BF16)


def attention(forward: bool, images: int, window: int) -> object:
    size, heads = (window, window), 2
    qkv, scale = empty(images, window, window, heads * 96), empty(heads, dtype=F32)
    grid, bias = empty(images, window, window, heads * 32), empty(heads, window**2, window**2, dtype=F32)
    if forward:
        return triton_forward.forward(qkv, bias, scale, heads, size, (0, 0))
    lse = empty(images, heads, window**2, dtype=F32)
    return triton_backward.backward(grid, qkv, bias, scale, grid, lse, heads, size, (0, 0))


def logits(views: int, teachers: int, groups: int, codes: int) -> tuple[Any, ...]:
    scalar = empty(dtype=F32)
    return (empty(views, groups, codes), empty(teachers, groups, codes), empty(codes, dtype=F32), None, scalar, scalar,
            views == 1)


def slopes(views: int, teachers: int, groups: int, codes: int) -> object:
    *given, own = logits(views, teachers, groups, codes)
    rows = empty(2, views, groups, dtype=F32), empty(2, teachers, groups, dtype=F32)
    return distillation.backward(empty(dtype=F32), *given, *rows, own)


CASES: dict[str, Callable[[], object]] = {
    "distillation, rows": lambda: distillation.forward(*logits(1, 1, 2**24, 2**20)),
    "distillation, views": lambda: distillation.forward(*logits(12, 2, 2**16, 2**20)),
    "distillation, backward": lambda: slopes(12, 2, 2**16, 2**20),
    "local_norm, 66,000 planes": lambda: local_norm.forward(empty(22000, 3, 4, 4, dtype=F32), 3),
    "local_norm, one large image": lambda: local_norm.forward(empty(1, 1, 16384, 16384, dtype=F32), 47),
    "position_bias": lambda: bias(True),
    "position_bias, backward": lambda: bias(False),
    "gelu": lambda: gelu.forward(empty(2**24, 65536), None),
    "gelu, backward": lambda: gelu.backward(empty(2**24, 65536), empty(2**24, 65536), empty(65536)),
    "linear_gelu": lambda: mlp.linear_gelu(empty(2**24, 4096), empty(65536, 4096), None, pre=True, gelu=True),
    "gelu_gradient": lambda: mlp.gelu_gradient(empty(2**24, 64), empty(64, 65536), empty(2**24, 65536), True),
    "product_add": lambda: product_add(empty(2**24, 64), empty(64, 65536), empty(2**24, 65536)),
    "weight_gradient": lambda: weight_gradient(empty(2**24, 65536), empty(2**24, 4096), F32),
    "mask_tokens": lambda: mask_tokens.forward(
        empty(2**20, 64, 64, 8), empty(2**20, 64, 64, dtype=torch.bool), empty(8), None, None, None, 1e-5, BF16),
    "mask_tokens, backward": lambda: mask_tokens.backward(
        empty(2**20, 64, 64, 8), None, None, empty(2**20, 64, 64, dtype=torch.bool), empty(0), empty(0), None, True,
        BF16),
    "patch_merge": lambda: patch_merge.forward(empty(2**12, 256, 256, 4096), None, None, 1e-5, BF16),
    "patch_merge, backward": lambda: patch_merge.backward(
        empty(2**12, 128, 128, 16384), None, empty(0), empty(0), None, 256, 256, BF16),
    "residual_norm": lambda: norm(True),
    "residual_norm, backward": lambda: norm(False),
    "masked_l1": lambda: masked_loss.forward(empty(2**20, 1, 1, 768), *image_loss(2**20)),
    "masked_l1, backward": lambda: masked_loss.backward(
        empty(dtype=F32), empty(2**20, 1, 1, 768), *image_loss(2**20)[:4], empty(dtype=F32), 16, "l1"),
    "linear_masked_l1": lambda: linear_loss.forward(
        empty(2**20, 1, 1, 4096), empty(768, 4096), None, *image_loss(2**20), 1e-6, 0.0, BF16, True),
    "window_attention, small windows": lambda: attention(True, 2**24, 4),
    "window_attention, small windows, backward": lambda: attention(False, 2**24, 4),
    "window_attention, large windows": lambda: attention(True, 2**18, 72),
    "window_attention, large windows, backward": lambda: attention(False, 2**18, 72),
    "unshuffle": lambda: unshuffle.forward(
        empty(2**20, 65, 512), empty(2**20, 4096, dtype=torch.int64), empty(512), empty(4097, 512), BF16),
    "unshuffle, backward": lambda: unshuffle.backward(
        empty(2**20, 4097, 512), empty(2**20, 4096, dtype=torch.int64), 65, True, BF16),
    "linear_masked_l1, backward": lambda: linear_loss.backward(
        empty(dtype=F32), empty(dtype=F32), empty(2**20, 1, 1, 4096), empty(768, 4096), empty(768), F32, F32),
}


@pytest.mark.parametrize("name", CASES)
def test_within_what_cuda_allows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, grid, **kwargs: grids.append(tuple(grid)))
    monkeypatch.setattr(arrival, "counters", lambda count, device: torch.empty(count, dtype=torch.int32))
    with FakeTensorMode():
        CASES[name]()
    assert grids and all(prod(grid[1:]) and max(grid[1:], default=1) <= 65535 and grid[0] < 2**31 for grid in grids)
