"""A linear head with its masked loss by :mod:`.linear_kernels`: their tiles, chunks of rows, and launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase, in_dtype
from ..common.matmul import precision
from ..common.sizes import cdiv, next_power_of_2
from ..common.token_layout import EPS
from .linear_kernels import (
    head_loss_kernel,
    order_kernel,
    scale_kernel,
    statistics_kernel,
    token_gradient_kernel,
    weight_gradient_kernel,
)
from .on_triton import _flat


def config(dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Tiles of the three products."""
    deep = 32 if dtype == torch.float32 else 64
    return {"loss": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3},
            "tokens": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3},
            "weight": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3}}


STATISTICS = 1024
"""Pixels of a token whose mean and variance are taken at a time."""
SCAN = 4096
"""Tokens that get their places at a time."""
SLOPE_BYTES = 32 << 20
"""Most memory for the slope of a chunk, which lives from one kernel to the next two."""


def chunk_rows(tokens: int, row_bytes: int) -> int:
    """Rows whose slope exists at a time, in whole tiles."""
    return max(64, min(SLOPE_BYTES // row_bytes, tokens + 63) // 64 * 64)


def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
            std: Tensor | None, stride: int, loss: str, target_eps: float, count_eps: float, dtype: torch.dtype,
            grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, d tokens, d weight, d bias), the gradients without the scale and empty unless asked for."""
    # The head is cast tile by tile.
    x, head = tokens.flatten(0, 2).to(dtype).contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    target, cells = target.contiguous(), mask.view(torch.uint8).contiguous()
    (m, d), k, device = x.shape, weight.shape[0], tokens.device
    height, width = target.shape[2:]
    rows, cfg = chunk_rows(m, k * dtype.itemsize), config(dtype)
    assert max(target[0].numel(), rows * k) < 2**31, "offsets within an image and within a chunk's slope are int32"
    cell = height // mask.shape[1], width // mask.shape[2]
    grid = cdiv(rows, cfg["loss"]["BM"]), cdiv(k, cfg["loss"]["BN"])
    order, hits, count = ordered(cells, tokens.shape, cell, stride, 1 + grid[1])

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    slope = make(rows, k, dtype=dtype) if grads else None
    d_x = make(*tokens.shape, dtype=tokens.dtype) if grads else make(0, dtype=tokens.dtype)
    d_w = make(*weight.shape) if grads else make(0)
    d_bias = make(k) if grads and bias is not None else make(0)
    blocks = cdiv(m, rows) * grid[0]
    sums, biases = make(2, blocks, grid[1]), make(blocks, k) if d_bias.numel() else None
    value, scale = make(), make()
    sizes = (blocks, tokens.shape[1], tokens.shape[2], height, width, *mask.shape[1:], d, k)
    pixels = (target, _flat(mean), _flat(std))
    stats = make(m, 2) if target_eps else None
    if stats is not None:
        statistics_kernel.run(*pixels, order, hits, stats, *sizes[1:5], k, target_eps, S=stride, BLOCK=STATISTICS,
                              num_warps=4, grid=(m,), warmup=False)
    for first in range(0, m, rows):
        last = min(first + rows, m)
        head_loss_kernel.run(
            x, head, bias, target, cells, *pixels[1:], stats, order, hits, slope, sums, biases,
            count, value, scale, None if biases is None else d_bias, first, *sizes,
            S=stride, CELL_H=cell[0], CELL_W=cell[1], LOSS=loss, PRECISION=precision(dtype), EPS=count_eps,
            **cfg["loss"], grid=grid, warmup=False)
        if grads:
            _gradients(slope, x, head, order, hits, d_x, d_w, first, last, cfg)
    return value, scale, d_x, d_w, d_bias


def ordered(mask: Tensor, shape: Sequence[int], cell: tuple[int, int], stride: int, counters: int
            ) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, those with masked pixels first; how many those are; zeros) of a (B, Hm, Wm) mask, all int32.

    The last are ``counters`` of this forward alone: what is left in them when it fails between two chunks is
    nobody's, and they are made in the launch that is there anyway.
    """
    m, device = shape[0] * shape[1] * shape[2], mask.device
    assert max(m, mask.numel()) < 2**31 - 2**16, "offsets of tokens and cells are int32"
    order, hits, zeros = (torch.empty(size, dtype=torch.int32, device=device) for size in ((m,), (), (counters,)))
    # Where cells do not divide a token, one more can reach into it.
    reach = [next_power_of_2(cdiv(stride, c) + (stride % c != 0)) for c in cell]
    block = max(16, min(1024, 2048 // reach[1]))
    order_kernel.run(
        mask, torch.empty(m, dtype=torch.uint8, device=device), order, hits, arrival.counters(1, device), zeros,
        m, shape[1], shape[2], *mask.shape[1:], counters, S=stride, CELL_H=cell[0], CELL_W=cell[1], ROWS=reach[0],
        COLS=reach[1], BLOCK=block, SCAN=SCAN, num_warps=8, grid=(cdiv(m, block),), warmup=False)
    return order, hits, zeros


def backward(grad: Tensor, scale: Tensor, d_tokens: Tensor, d_weight: Tensor, d_bias: Tensor,
             weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients times ``grad``·``scale``."""
    given = d_tokens, d_weight, d_bias
    found = tuple(torch.empty_like(t, dtype=dtype)
                  for t, dtype in zip(given, (d_tokens.dtype, weight_dtype, bias_dtype), strict=True))
    grid = (sum(cdiv(t.numel(), 4096) for t in given),)
    biases = given[2] if d_bias.numel() else None, found[2] if d_bias.numel() else None
    scale_kernel.run(grad, scale, *given[:2], biases[0], *found[:2], biases[1], *(t.numel() for t in given),
                     BLOCK=4096, num_warps=8, grid=grid, warmup=False)
    return found  # type: ignore[return-value]


def _gradients(slope: Tensor | None, x: Tensor, head: Tensor, order: Tensor, hits: Tensor, d_x: Tensor, d_w: Tensor,
               first: int, last: int, cfg: dict[str, dict[str, int]]) -> None:
    (k, d), tiles, exactness = head.shape, cfg["tokens"], precision(x.dtype)
    grid = cdiv(last - first, tiles["BM"]), cdiv(d, tiles["BN"])
    token_gradient_kernel.run(slope, head, order, hits, d_x, first, last, d, k, PRECISION=exactness, **tiles,
                              grid=grid, warmup=False)
    tiles = cfg["weight"]
    grid = cdiv(k, tiles["BM"]), cdiv(d, tiles["BN"])
    weight_gradient_kernel.run(slope, x, order, hits, d_w, first, last, d, k, ADD=first > 0, PRECISION=exactness,
                               **tiles, grid=grid, warmup=False)


_TYPES = {"p_stats": "*fp32", "eps": "fp32",
          "p_x": "*bf16", "p_w": "*fp32", "p_bias": "*fp32", "p_target": "*fp32", "p_mask": "*u8", "p_hit": "*u8",
          "p_order": "*i32", "p_hits": "*i32", "p_zeros": "*i32", "p_slope": "*bf16", "p_sum": "*fp32",
          "p_dbias": "*fp32", "p_dx": "*bf16", "p_dw": "*fp32", "p_counter": "*i32", "p_loss": "*fp32",
          "p_scale": "*fp32", "p_bias_grad": "*fp32", "p_grad": "*fp32", "p_tokens": "*bf16", "p_weight": "*fp32",
          "p_tokens_out": "*bf16", "p_weight_out": "*fp32", "p_bias_out": "*fp32"}


def aot_cases() -> list[AotCase]:
    """Head of the Swin encoders (3,072 values a token); the widths are run-time arguments."""
    cfg, wide = config(torch.bfloat16), config(torch.float32)
    loss: dict[str, Any] = {"S": 32, "CELL_H": 4, "CELL_W": 4, "LOSS": "l1", "p_mean": None, "p_std": None,
                            "p_stats": None, "EPS": EPS}
    mae = {k: v for k, v in loss.items() if k != "p_stats"} | {"S": 16, "CELL_H": 16, "CELL_W": 16, "LOSS": "l2"}
    whole = _case("statistics", statistics_kernel, {"num_warps": 4, "num_stages": 2},
                  {"S": 16, "BLOCK": STATISTICS, "p_mean": None, "p_std": None})
    scaled = _case("scale", scale_kernel, {"num_warps": 8, "num_stages": 2}, {"BLOCK": 4096})
    place = _case("order", order_kernel, {"num_warps": 8, "num_stages": 2},
                  {"S": 32, "CELL_H": 4, "CELL_W": 4, "ROWS": 8, "COLS": 8, "BLOCK": 256, "SCAN": SCAN})
    # Bytes of the mask.
    place = dataclasses.replace(place, dot=False, wide_target=0.0)
    return [place, dataclasses.replace(scaled, dot=False, signature={**scaled.signature, "p_bias": "*fp32"}),
            dataclasses.replace(whole, dot=False, wide_target=0.0),
            _case("loss", head_loss_kernel, cfg["loss"], loss),
            _case("loss/mae", head_loss_kernel, cfg["loss"], mae),
            _case("tokens", token_gradient_kernel, cfg["tokens"], {}),
            _case("weight", weight_gradient_kernel, cfg["weight"], {"ADD": True}),
            *(_in_float32(_case(*given)) for given in (
                ("loss", head_loss_kernel, wide["loss"], loss), ("tokens", token_gradient_kernel, wide["tokens"], {}),
                ("weight", weight_gradient_kernel, wide["weight"], {"ADD": True})))]


def _in_float32(case: AotCase) -> AotCase:
    """Its products are exact by default, and then not on tensor cores."""
    return dataclasses.replace(in_dtype(case, "fp32"), dot=False)


def _case(name: str, kernel: Any, tiles: dict[str, int], constexprs: dict[str, Any]) -> AotCase:
    exact = {"PRECISION": "ieee"} if "PRECISION" in kernel.arg_names else {}
    constexprs = {**exact, **constexprs, **{k: v for k, v in tiles.items() if k.startswith("B")}}
    signature = {n: _TYPES.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
    divisible = tuple(n for n in signature if n not in ("grid_h", "grid_w", "row_blocks", "zeros"))
    return AotCase(name, kernel, signature, constexprs, tiles["num_warps"], tiles["num_stages"], divisible,
                   quick=True, dot=True, others=("fp16",), trips=_TRIPS.get(kernel.fn.__name__))


# As if every token had masked pixels; the one program that gives the tokens their places stands for all.
_TRIPS: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {
    "order_kernel": lambda a: (a["zeros"] / a["SCAN"] / a["grid"][0], a["tokens"] / a["SCAN"] / a["grid"][0]),
    "statistics_kernel": lambda a: (a["K"] / a["BLOCK"],),
    "head_loss_kernel": lambda a: (a["D"] / a["BK"],),
    "token_gradient_kernel": lambda a: (a["K"] / a["BK"],),
    "weight_gradient_kernel": lambda a: ((a["last"] - a["first"]) / a["BK"],),
}
