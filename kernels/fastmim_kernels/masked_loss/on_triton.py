"""Masked pixel loss on predictions in token layout, against an image in its own layout.

One program per token. It looks at the token's mask cells first and leaves visible tokens alone: their
predictions and pixels are not read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.sizes import next_power_of_2

EPS = tl.constexpr(1e-5)


@triton.jit
def token_mask(p_mask, i_b, i_y, i_x, height, width, mask_h, mask_w, S: tl.constexpr, S_PAD: tl.constexpr,
               CELL_H: tl.constexpr, CELL_W: tl.constexpr):
    """(S_PAD, S_PAD) bool: masked pixels of the token at (i_y, i_x), within token and image.

    CELL_H × CELL_W is the greatest common measure of mask patches and tokens; a cell is loaded once.
    """
    if S == S_PAD:
        ROWS: tl.constexpr = S // CELL_H
        COLS: tl.constexpr = S // CELL_W
        o_y = i_y * S + tl.arange(0, ROWS) * CELL_H
        o_x = i_x * S + tl.arange(0, COLS) * CELL_W
    else:
        o_r = tl.arange(0, S_PAD)
        o_y = tl.where(o_r < S, i_y * S + o_r, height)
        o_x = tl.where(o_r < S, i_x * S + o_r, width)
    o_cell = (i_b * mask_h + o_y // (height // mask_h))[:, None] * mask_w + (o_x // (width // mask_w))[None, :]
    b_cell = tl.load(p_mask + o_cell, mask=(o_y < height)[:, None] & (o_x < width)[None, :], other=0)
    if S == S_PAD:
        b_cell = tl.broadcast_to(b_cell[:, None, :, None], (ROWS, CELL_H, COLS, CELL_W))
        b_cell = tl.reshape(b_cell, (S_PAD, S_PAD))
    return b_cell != 0


@triton.jit
def slope_of(b_d, LOSS: tl.constexpr):
    """l'(difference)."""
    if LOSS == "l1":
        return tl.where(b_d > 0, 1.0, tl.where(b_d < 0, -1.0, b_d))
    elif LOSS == "l2":
        return 2 * b_d
    else:
        return tl.minimum(tl.maximum(b_d, -1.0), 1.0)


@triton.jit
def loss_of(b_d, LOSS: tl.constexpr):
    """l(difference)."""
    b_a = tl.abs(b_d)
    if LOSS == "l1":
        return b_a
    elif LOSS == "l2":
        return b_d * b_d
    else:
        return tl.where(b_a < 1, 0.5 * b_d * b_d, b_a - 0.5)


@triton.jit
def pixels_of(p_target, o_pixel, m_pixel, p_mean, p_std, i_c):
    """Target values in float32; uint8 ones are normalised by the statistics of channel(s) i_c."""
    b_t = tl.load(p_target + o_pixel, mask=m_pixel, other=0).to(tl.float32)
    if p_mean is not None:
        b_std = tl.load(p_std + i_c)
        b_t = b_t * (1 / (255 * b_std)) - tl.load(p_mean + i_c) / b_std
    return b_t


@triton.jit(do_not_specialize=["grid_h", "grid_w"])
def masked_l1_kernel(
    p_pred,  # (B, h, w, C, S, S) predictions
    p_target,  # (B, C, H, W) float32 or uint8
    p_mask,  # (B, Hm, Wm) bool as uint8
    p_mean,  # (C,) or None
    p_std,  # (C,) or None
    p_factor,  # scalar float32, gradient of the sum (backward only, else None)
    p_out,  # backward: (B, h, w, C, S, S) gradient; forward: (tokens,) float32 loss sums
    p_count,  # (tokens,) int32 masked pixels, None in backward
    grid_h, grid_w, height, width, mask_h, mask_w,
    C: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    LOSS: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    i_x = i_token % grid_w
    i_y = i_token // grid_w % grid_h
    i_b = i_token // grid_w // grid_h
    o_r = tl.arange(0, S_PAD)
    m_s = (o_r < S)[:, None] & (o_r < S)[None, :]
    m_hit = token_mask(p_mask, i_b, i_y, i_x, height, width, mask_h, mask_w, S, S_PAD, CELL_H, CELL_W)
    n_hit = tl.sum(tl.sum(m_hit.to(tl.int32), 1), 0)
    o_pred = i_token * (C * S * S) + o_r[:, None] * S + o_r[None, :]
    o_pixel = (i_b * C * height + i_y * S + o_r)[:, None] * width + i_x * S + o_r[None, :]
    plane = tl.cast(height, tl.int64) * width
    # Whole tokens are loaded: a predicate per pixel would make every access scalar.
    m_in = m_s & (i_y * S + o_r < height)[:, None] & (i_x * S + o_r < width)[None, :]
    if p_factor is not None:
        b_factor = tl.load(p_factor)
    a_sum = tl.zeros((S_PAD, S_PAD), tl.float32)
    if n_hit > 0:
        for i_c in range(C):
            b_p = tl.load(p_pred + o_pred + i_c * (S * S), mask=m_in, other=0).to(tl.float32)
            b_t = pixels_of(p_target, o_pixel + i_c * plane, m_in, p_mean, p_std, i_c)
            b_d = tl.where(m_hit, b_p - b_t, 0.0)
            if p_factor is not None:
                b_g = slope_of(b_d, LOSS) * b_factor
                tl.store(p_out + o_pred + i_c * (S * S), b_g.to(p_out.dtype.element_ty), mask=m_s)
            else:
                a_sum += loss_of(b_d, LOSS)
    elif p_factor is not None:
        for i_c in range(C):
            tl.store(p_out + o_pred + i_c * (S * S), a_sum.to(p_out.dtype.element_ty), mask=m_s)
    if p_factor is None:
        tl.store(p_out + i_token, tl.sum(tl.sum(a_sum, 1), 0))
        tl.store(p_count + i_token, n_hit)


@triton.jit(do_not_specialize=["n", "channels"])
def finish_kernel(
    p_sum,  # (n,) float32 loss sums
    p_count,  # (n,) int32 masked pixels
    p_loss,  # scalar float32
    p_scale,  # scalar float32, 1 / (count + 1e-5) / C
    n, channels, BLOCK: tl.constexpr,
):
    a_sum = tl.zeros((BLOCK,), tl.float32)
    a_count = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK)
        a_sum += tl.load(p_sum + o, mask=o < n, other=0)
        a_count += tl.load(p_count + o, mask=o < n, other=0).to(tl.int64)
    b_scale = 1 / (tl.sum(a_count, 0).to(tl.float32) + EPS) / channels
    tl.store(p_scale, b_scale)
    tl.store(p_loss, tl.sum(a_sum, 0) * b_scale)


def config(stride: int, mask_cell: tuple[int, int]) -> dict[str, int]:
    """Tile of one channel of one token; 16 values a thread, so that uint8 pixels load 128 bits."""
    pad = next_power_of_2(stride)
    return {"S": stride, "S_PAD": pad, "CELL_H": math.gcd(mask_cell[0], stride),
            "CELL_W": math.gcd(mask_cell[1], stride), "num_warps": max(1, min(4, pad * pad // 512))}


def _launch(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
            loss: str, factor: Tensor | None, out: Tensor, count: Tensor | None) -> None:
    b, h, w, _ = prediction.shape
    _, c, height, width = target.shape
    cfg = config(stride, (height // mask.shape[1], width // mask.shape[2]))
    masked_l1_kernel.run(
        prediction, target, mask.view(torch.uint8), _flat(mean), _flat(std), factor, out, count,
        h, w, height, width, mask.shape[1], mask.shape[2], C=c, LOSS=loss, **cfg, grid=(b * h * w,), warmup=False)


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1).contiguous()


def forward(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
            loss: str) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as the op ``fastmim::masked_l1``."""
    prediction, target, mask = (t.contiguous() for t in (prediction, target, mask))
    tokens = prediction.shape[:3].numel()
    sums = torch.empty(tokens, dtype=torch.float32, device=prediction.device)
    count = torch.empty(tokens, dtype=torch.int32, device=prediction.device)
    _launch(prediction, target, mask, mean, std, stride, loss, None, sums, count)
    result = torch.empty((), dtype=torch.float32, device=prediction.device)
    scale = torch.empty((), dtype=torch.float32, device=prediction.device)
    finish_kernel.run(sums, count, result, scale, tokens, target.shape[1], BLOCK=1024, grid=(1,), warmup=False)
    return result, scale


def backward(grad: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None,
             std: Tensor | None, scale: Tensor, stride: int, loss: str) -> Tensor:
    """Launch the kernel; arguments and result as the op ``fastmim::masked_l1_backward``."""
    prediction, target, mask = (t.contiguous() for t in (prediction, target, mask))
    out = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    _launch(prediction, target, mask, mean, std, stride, loss, grad * scale, out, None)
    return out


def aot_cases() -> list[AotCase]:
    """Swin (stride 32, mask at patch resolution) against float and uint8 images, and ViT (stride 16)."""
    cases = []
    shapes = (("swin", 32, 4, "*fp32"), ("swin_uint8", 32, 4, "*u8"), ("vit", 16, 16, "*fp32"))
    for name, stride, cell, target in shapes:
        cfg = config(stride, (cell, cell))
        warps = cfg.pop("num_warps")
        for direction in ("forward", "backward"):
            types = {"p_pred": "*bf16", "p_target": target, "p_mask": "*u8", "p_mean": "*fp32", "p_std": "*fp32",
                     "p_factor": "*fp32", "p_out": "*fp32" if direction == "forward" else "*bf16", "p_count": "*i32",
                     "grid_h": "i32", "grid_w": "i32", "height": "i32", "width": "i32", "mask_h": "i32",
                     "mask_w": "i32"}
            absent = ["p_factor"] if direction == "forward" else ["p_count"]
            absent += [] if target == "*u8" else ["p_mean", "p_std"]
            signature = {k: v for k, v in types.items() if k not in absent}
            constexprs = {"C": 3, "LOSS": "l1"} | cfg | dict.fromkeys(absent)
            divisible = (*(k for k, v in signature.items() if v[0] == "*"), "height", "width", "mask_h", "mask_w")
            cases.append(AotCase(f"{direction}/{name}", masked_l1_kernel, signature, constexprs, warps, 2, divisible,
                                 quick=name == "swin", trips=lambda a: (a["C"],)))
    return [*cases, AotCase(
        "finish", finish_kernel, {"p_sum": "*fp32", "p_count": "*i32", "p_loss": "*fp32", "p_scale": "*fp32",
                                  "n": "i32", "channels": "i32"}, {"BLOCK": 1024},
        divisible=("p_sum", "p_count", "p_loss", "p_scale", "n"), wide_target=0.0, persistent=True,
        trips=lambda a: (a["n"] / a["BLOCK"],))]
