"""Inputs of every op for the self-test: small odd ones, those that reach what the encoders ship, large ones to time.

A shipped example has the *widths* of an encoder and only as many rows as the launch needs to behave as at batch 128:
rows for several trips of a persistent program, for more than one group of partial sums, for a split product. Nothing
else of a launch depends on the number of rows. ``tests/kernels/test_launches.py`` holds that against the launches that
the encoders request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Build = Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One public op on made-up inputs; ``op`` and ``variant`` name it."""

    op: str
    variant: str
    build: Build
    """Keyword arguments, tensors or lists of them, float ones in float32 on the CPU."""
    low: tuple[str, ...]
    """Arguments that come in the low precision; parameters stay float32."""
    grads: tuple[str, ...]
    only: torch.dtype | None = None
    """In which the op computes whatever its arguments; None: in that of ``low``."""


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Values that depend on the shape alone."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu")


def _hidden(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu") < 0.6


def _mask_tokens(b: int, h: int, w: int, c: int, norm: bool = True, pos: bool = False) -> dict[str, Any]:
    given = {"tokens": normal(b, h, w, c), "mask": _hidden(b, h, w), "mask_token": normal(c)}
    given |= {"norm_weight": 1 + normal(c, scale=0.1), "norm_bias": normal(c)} if norm else {}
    return given | ({"pos_embed": normal(h, w, c)} if pos else {})


def _pixels(b: int, n: int, stride: int, cell: int) -> dict[str, Any]:
    edge = stride * n
    return {"target": normal(b, 3, edge, edge), "mask": _hidden(b, edge // cell, edge // cell), "stride": stride}


def _masked_l1(b: int, n: int) -> dict[str, Any]:
    return {"prediction": normal(b, n, n, 3 * 32**2), **_pixels(b, n, 32, 4)}


def _linear_masked_l1(b: int, n: int, d: int, stride: int = 32, cell: int = 4) -> dict[str, Any]:
    k = 3 * stride**2
    return {"tokens": normal(b, n, n, d), "weight": normal(k, d, scale=d**-0.5), "bias": normal(k),
            **_pixels(b, n, stride, cell)}


def _window_attention(shape: tuple[int, int, int], heads: int, edge: int, shift: int, cosine: bool) -> dict[str, Any]:
    given = {"qkv": normal(*shape, 3 * heads * 32), "bias": normal(heads, edge**2, edge**2), "num_heads": heads,
             "window_size": (edge, edge), "shift_size": (shift, shift)}
    return given | ({"logit_scale": 2 + normal(heads, scale=0.1)} if cosine else {})


def _residual_norm(shape: tuple[int, ...], order: str, *, residual: bool = True, branch: bool = True,
                   bias: bool = False, gamma: bool = False, drop: bool = True, **settings: Any) -> dict[str, Any]:
    c = shape[-1]
    given = {"residual": normal(*shape) if residual else None,
             "branch": normal(*reversed(shape)).reshape(shape) if branch else None, "order": order,
             "weight": 1 + normal(c, scale=0.1), "bias": normal(c), **settings}
    given |= {"drop_scale": 1.25 * (~_hidden(shape[0])).float()} if drop else {}
    given |= {"branch_bias": normal(c, scale=0.5)} if bias else {}
    return given | ({"gamma": 0.1 + normal(c, scale=0.01)} if gamma else {})


def _layer_norm(*shape: int) -> dict[str, Any]:
    return {"x": normal(*shape), "weight": 1 + normal(shape[-1], scale=0.1), "bias": normal(shape[-1])}


def _mlp(rows: int, c: int) -> dict[str, Any]:
    return {"x": normal(rows, c), "weight1": normal(4 * c, c, scale=c**-0.5), "bias1": normal(4 * c),
            "weight2": normal(c, 4 * c, scale=(4 * c) ** -0.5), "bias2": normal(c)}


def _linear(rows: int, c: int, out: int, bias: bool = True) -> dict[str, Any]:
    return {"x": normal(rows, c), "weight": normal(out, c, scale=c**-0.5), **({"bias": normal(out)} if bias else {})}


def _cpb_bias(edge: int, heads: int, depth: int) -> dict[str, Any]:
    table = (2 * edge - 1) ** 2
    return {"coords": normal(table, 2),
            "index": torch.arange(edge**4, device="cpu").reshape(edge**2, edge**2) % table,
            "weight1": normal(depth, 512, 2), "bias1": normal(depth, 512),
            "weight2": normal(depth, heads, 512, scale=0.05)}


def _low_copies(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    return {"tensors": [normal(*shape) for shape in shapes], "dtype": dtype}


def _tensor(name: str, *shape: int, **more: Any) -> dict[str, Any]:
    return {name: normal(*shape), **more}


_TOKENS = ("tokens", "mask_token", "norm_weight", "norm_bias")
_NORM = ("residual", "branch", "weight", "bias")
_MLP = ("x", "weight1", "bias1", "weight2", "bias2")
_LINEAR = ("x", "weight", "bias")
_HEAD = ("tokens", "weight", "bias")
_COSINE = ("qkv", "bias", "logit_scale")
# More than one piece of a program, a remainder of a vector, and less than one.
_PIECES: list[tuple[int, ...]] = [(130, 129), (37,), (1,)]

# Odd sizes leave a remainder in every tile. Windows of up to 64 tokens and larger ones run different kernels.
SMALL = (
    Case("mask_tokens", "norm", partial(_mask_tokens, 3, 6, 5, 40), ("tokens",), _TOKENS),
    Case("residual_norm", "pre", partial(_residual_norm, (3, 5, 7, 72), "pre"), ("branch",), _NORM),
    Case("residual_norm", "post", partial(_residual_norm, (3, 5, 7, 72), "post"), ("branch",), _NORM),
    Case("window_attention", "scaled dot", partial(_window_attention, (1, 24, 12), 2, 6, 3, False), ("qkv",),
         ("qkv", "bias")),
    Case("window_attention", "cosine", partial(_window_attention, (1, 24, 12), 2, 6, 3, True), ("qkv",), _COSINE),
    Case("window_attention", "cosine, 144 tokens", partial(_window_attention, (1, 24, 12), 2, 12, 6, True), ("qkv",),
         _COSINE),
    Case("mlp", "", partial(_mlp, 37, 24), ("x",), _MLP),
    Case("linear", "", partial(_linear, 37, 24, 72), ("x",), _LINEAR),
    Case("mlp_and_input", "", partial(_mlp, 37, 24), ("x",), _MLP),
    Case("linear_and_input", "", partial(_linear, 37, 24, 72), ("x",), _LINEAR),
    Case("layer_norm", "", partial(_layer_norm, 3, 5, 7, 72), ("x",), ("x", "weight", "bias")),
    Case("mask_tokens_twice", "norm", partial(_mask_tokens, 3, 6, 5, 40), ("tokens",), _TOKENS),
    Case("gelu", "bias", lambda: {"x": normal(37, 72), "bias": normal(72)}, ("x",), ("x", "bias")),
    Case("patch_merge", "", partial(_tensor, "x", 3, 5, 6, 40), ("x",), ("x",)),
    Case("cpb_bias", "", partial(_cpb_bias, 3, 2, 2), (), ("weight1", "bias1", "weight2"), torch.float32),
    Case("masked_l1", "", partial(_masked_l1, 3, 2), ("prediction",), ("prediction",)),
    Case("linear_masked_l1", "", partial(_linear_masked_l1, 3, 2, 40), ("tokens",), _HEAD),
    Case("local_norm_target", "", partial(_tensor, "images", 2, 3, 33, 50, kernel_size=13), (), (), torch.float32),
    Case("low_copies", "bfloat16", partial(_low_copies, _PIECES, torch.bfloat16), (), (), torch.bfloat16),
    Case("low_copies", "float16", partial(_low_copies, _PIECES, torch.float16), (), (), torch.float16))

SHIPPED: tuple[Case, ...] = ()

_B, _H, _C = 64, 48, 128
# A stage of Swin-B.
TIMED: dict[tuple[str, str], Build] = {
    ("mask_tokens", "norm"): partial(_mask_tokens, _B, _H, _H, _C),
    ("residual_norm", "pre"): partial(_residual_norm, (_B, _H, _H, _C), "pre"),
    ("residual_norm", "post"): partial(_residual_norm, (_B, _H, _H, _C), "post"),
    ("window_attention", "scaled dot"): partial(_window_attention, (32, _H, _H), 4, 6, 3, False),
    ("window_attention", "cosine"): partial(_window_attention, (32, _H, _H), 4, 6, 3, True),
    ("window_attention", "cosine, 144 tokens"): partial(_window_attention, (32, _H, _H), 4, 12, 6, True),
    ("mlp", ""): partial(_mlp, _B * _H * _H, _C),
    ("linear", ""): partial(_linear, _B * _H * _H, _C, 3 * _C),
    ("mlp_and_input", ""): partial(_mlp, _B * _H * _H, _C),
    ("linear_and_input", ""): partial(_linear, _B * _H * _H, _C, 3 * _C),
    ("layer_norm", ""): partial(_layer_norm, _B, _H, _H, _C),
    ("mask_tokens_twice", "norm"): partial(_mask_tokens, _B, _H, _H, _C),
    ("gelu", "bias"): lambda: {"x": normal(_B * _H * _H, 4 * _C), "bias": normal(4 * _C)},
    ("patch_merge", ""): partial(_tensor, "x", _B, _H, _H, _C),
    ("cpb_bias", ""): partial(_cpb_bias, 12, 16, 18),
    ("masked_l1", ""): partial(_masked_l1, _B, 6),
    ("linear_masked_l1", ""): partial(_linear_masked_l1, _B, 6, 1024),
    ("local_norm_target", ""): partial(_tensor, "images", _B, 3, 192, 192, kernel_size=47),
    ("low_copies", "bfloat16"): partial(_low_copies, [(4096, 1024), (1024,)] * 24, torch.bfloat16),
    ("low_copies", "float16"): partial(_low_copies, [(4096, 1024), (1024,)] * 24, torch.float16)}
"""Inputs that are worth timing, of each of :data:`SMALL`."""
