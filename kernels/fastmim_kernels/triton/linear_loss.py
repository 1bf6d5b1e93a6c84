"""SimMIM's linear head with its masked loss: the prediction lives in registers only.

The tokens are ordered on the device, those with masked pixels first, and their number stays there: a program
whose rows lie beyond it returns at once, so nothing waits for the host. Of each chunk of rows three kernels
make the loss and the slope l'(x̂ − x)·m, then the gradients of tokens and head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..token_layout import token_cells
from .aot import AotCase
from .masked_l1 import _flat, loss_of, slope_of


@triton.jit
def head_loss_kernel(
    p_x,  # (M, D) tokens
    p_w,  # (K, D) head, K = C·S²
    p_bias,  # (K,) or None
    p_target,  # (B, C, H, W) float32 or uint8
    p_mask,  # (B, Hm, Wm) bool as uint8
    p_mean,  # (C,) or None
    p_std,  # (C,) or None
    p_order,  # (M,) int64 tokens, those with masked pixels first
    p_hits,  # scalar int64, number of tokens with masked pixels
    p_slope,  # (rows of the chunk, K) or None
    p_sum,  # (programs,) float32 loss sums
    p_dbias,  # (row blocks of the chunk, K) float32 or None
    first, grid_h, grid_w, height, width, mask_h, mask_w, D, K,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    hits = tl.load(p_hits)
    i_row = i_m * BM + tl.arange(0, BM)
    m_row = first + i_row < hits
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < K
    a_loss = 0.0
    a_bias = tl.zeros((BN,), tl.float32)
    if first + i_m * BM < hits:
        i_token = tl.load(p_order + first + i_row, mask=m_row, other=0)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            o_k = k + tl.arange(0, BK)
            b_x = tl.load(p_x + i_token[:, None] * D + o_k[None, :], mask=m_row[:, None] & (o_k < D)[None, :], other=0)
            b_w = tl.load(p_w + o_n[:, None] * D + o_k[None, :], mask=m_n[:, None] & (o_k < D)[None, :], other=0)
            acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)
        if p_bias is not None:
            acc += tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
        # Pixel of value n of the token: channel n // S², row n // S % S, column n % S.
        i_c = o_n // (S * S)
        i_y = (i_token // grid_w % grid_h * S)[:, None] + (o_n // S % S)[None, :]
        i_x = (i_token % grid_w * S)[:, None] + (o_n % S)[None, :]
        i_b = i_token // grid_w // grid_h
        m_in = m_row[:, None] & m_n[None, :] & (i_y < height) & (i_x < width)
        o_cell = i_b[:, None] * (mask_h * mask_w) + i_y // (height // mask_h) * mask_w + i_x // (width // mask_w)
        m_hit = tl.load(p_mask + o_cell, mask=m_in, other=0) != 0
        o_image = (i_b * (K // (S * S)))[:, None] + i_c[None, :]
        b_t = tl.load(p_target + (o_image * height + i_y) * width + i_x, mask=m_in, other=0).to(tl.float32)
        if p_mean is not None:
            b_std = tl.load(p_std + i_c, mask=m_n, other=1)
            b_mean = tl.load(p_mean + i_c, mask=m_n, other=0)
            b_t = b_t * (1 / (255 * b_std))[None, :] - (b_mean / b_std)[None, :]
        b_d = tl.where(m_hit, acc - b_t, 0.0)
        a_loss = tl.sum(tl.sum(loss_of(b_d, LOSS), 1), 0)
        if p_slope is not None:
            b_slope = slope_of(b_d, LOSS)
            a_bias = tl.sum(b_slope, 0)
            o_slope = i_row[:, None] * K + o_n[None, :]
            tl.store(p_slope + o_slope, b_slope.to(p_slope.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])
    tl.store(p_sum + i_m * tl.num_programs(1) + i_n, a_loss)
    if p_dbias is not None:
        tl.store(p_dbias + i_m * K + o_n, a_bias, mask=m_n)


@triton.jit
def token_gradient_kernel(
    p_slope,  # (rows of the chunk, K)
    p_w,  # (K, D) head
    p_order,  # (M,) int64
    p_hits,  # scalar int64
    p_dx,  # (M, D) gradient of the tokens; zero where nothing is masked
    first, last, D, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    i_row = i_m * BM + tl.arange(0, BM)
    m_row = first + i_row < last
    hits = tl.load(p_hits)
    m_hit = m_row & (first + i_row < hits)
    o_d = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m_d = o_d < D
    i_token = tl.load(p_order + first + i_row, mask=m_row, other=0)
    acc = tl.zeros((BM, BN), tl.float32)
    if first + i_m * BM < hits:
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < K
            b_s = tl.load(p_slope + i_row[:, None] * K + o_k[None, :], mask=m_hit[:, None] & m_k[None, :], other=0)
            b_w = tl.load(p_w + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0)
            acc = tl.dot(b_s, b_w, acc, input_precision=PRECISION)
    tl.store(p_dx + i_token[:, None] * D + o_d[None, :], acc.to(p_dx.dtype.element_ty),
             mask=m_row[:, None] & m_d[None, :])


@triton.jit
def weight_gradient_kernel(
    p_slope,  # (rows of the chunk, K)
    p_x,  # (M, D) tokens
    p_order,  # (M,) int64
    p_hits,  # scalar int64
    p_dw,  # (K, D) float32, sum over chunks
    first, last, D, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < K
    m_d = o_d < D
    rows = tl.minimum(tl.load(p_hits), last) - first
    acc = tl.zeros((BM, BN), tl.float32)
    for r in range(0, rows, BK):
        i_row = r + tl.arange(0, BK)
        m_row = i_row < rows
        i_token = tl.load(p_order + first + i_row, mask=m_row, other=0)
        b_s = tl.load(p_slope + i_row[:, None].to(tl.int64) * K + o_n[None, :], mask=m_row[:, None] & m_n[None, :],
                      other=0)
        b_x = tl.load(p_x + i_token[:, None] * D + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0)
        acc = tl.dot(tl.trans(b_s), b_x, acc, input_precision=PRECISION)
    p_out = p_dw + o_n[:, None] * D + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    if ADD:
        acc += tl.load(p_out, mask=m_out, other=0)
    tl.store(p_out, acc, mask=m_out)


def config(dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Tiles of the three products."""
    deep = 32 if dtype == torch.float32 else 64
    return {"loss": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3},
            "tokens": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3},
            "weight": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3}}


def chunk_rows(tokens: int) -> int:
    """Rows whose slope exists at a time: at most half of the tokens and 4,096."""
    return max(64, min(4096, triton.cdiv(triton.cdiv(tokens, 2), 64) * 64))


def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
            std: Tensor | None, stride: int, loss: str, dtype: torch.dtype, grads: bool
            ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(Σ loss, (d tokens, d weight, d bias)) without the factor 1/(count·C); the gradients are empty unless asked."""
    x, head = tokens.flatten(0, 2).to(dtype).contiguous(), weight.to(dtype).contiguous()
    target, cells = target.contiguous(), mask.view(torch.uint8).contiguous()
    (m, d), k, device = x.shape, weight.shape[0], tokens.device
    height, width = target.shape[2:]
    hit = token_cells(mask, target.shape[2:], tokens.shape[1:3], stride).flatten(0, 2).flatten(1).any(1)
    order, hits = torch.argsort(hit, descending=True, stable=True), hit.sum()
    rows, cfg = chunk_rows(m), config(dtype)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    slope = make(rows, k, dtype=dtype) if grads else None
    d_x = make(*tokens.shape, dtype=tokens.dtype) if grads else make(0, dtype=tokens.dtype)
    d_w = make(*weight.shape) if grads else make(0)
    grid = triton.cdiv(rows, cfg["loss"]["BM"]), triton.cdiv(k, cfg["loss"]["BN"])
    chunks = triton.cdiv(m, rows)
    sums = make(chunks, *grid)
    biases = make(chunks, grid[0], k) if grads and bias is not None else None
    sizes = (tokens.shape[1], tokens.shape[2], height, width, *mask.shape[1:], d, k)
    for i, first in enumerate(range(0, m, rows)):
        last = min(first + rows, m)
        head_loss_kernel[grid](
            x, head, bias, target, cells, _flat(mean), _flat(std), order, hits, slope, sums[i],
            None if biases is None else biases[i], first, *sizes, S=stride, LOSS=loss, PRECISION=precision,
            **cfg["loss"])
        if grads:
            _gradients(slope, x, head, order, hits, d_x, d_w, first, last, precision, cfg)
    d_bias = make(0) if biases is None else biases.sum((0, 1))
    return sums.sum(), (d_x, d_w, d_bias)


def _gradients(slope: Tensor | None, x: Tensor, head: Tensor, order: Tensor, hits: Tensor, d_x: Tensor, d_w: Tensor,
               first: int, last: int, precision: str, cfg: dict[str, dict[str, int]]) -> None:
    (k, d), tiles = head.shape, cfg["tokens"]
    grid = triton.cdiv(last - first, tiles["BM"]), triton.cdiv(d, tiles["BN"])
    token_gradient_kernel[grid](slope, head, order, hits, d_x, first, last, d, k, PRECISION=precision, **tiles)
    tiles = cfg["weight"]
    grid = triton.cdiv(k, tiles["BM"]), triton.cdiv(d, tiles["BN"])
    weight_gradient_kernel[grid](slope, x, order, hits, d_w, first, last, d, k, ADD=first > 0, PRECISION=precision,
                                 **tiles)


_TYPES = {"p_x": "*bf16", "p_w": "*bf16", "p_bias": "*fp32", "p_target": "*fp32", "p_mask": "*u8", "p_order": "*i64",
          "p_hits": "*i64", "p_slope": "*bf16", "p_sum": "*fp32", "p_dbias": "*fp32", "p_dx": "*bf16",
          "p_dw": "*fp32"}


def aot_cases() -> list[AotCase]:
    """Head of the Swin encoders (3,072 values a token) in bf16; the widths are run-time arguments."""
    cfg = config(torch.bfloat16)
    loss: dict[str, Any] = {"S": 32, "LOSS": "l1", "p_mean": None, "p_std": None}
    return [_case("loss", head_loss_kernel, cfg["loss"], loss),
            _case("tokens", token_gradient_kernel, cfg["tokens"], {}),
            _case("weight", weight_gradient_kernel, cfg["weight"], {"ADD": True})]


def _case(name: str, kernel: Any, tiles: dict[str, int], constexprs: dict[str, Any]) -> AotCase:
    constexprs = {"PRECISION": "ieee", **constexprs, **{k: v for k, v in tiles.items() if k.startswith("B")}}
    signature = {n: _TYPES.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
    divisible = tuple(n for n in signature if n not in ("grid_h", "grid_w"))
    return AotCase(name, kernel, signature, constexprs, tiles["num_warps"], tiles["num_stages"], divisible,
                   quick=True, dot=True)
