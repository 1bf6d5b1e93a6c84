"""Inputs of every op for the self-test: small odd ones, those that reach what the encoders ship, large ones to time.

A shipped example makes the launchers choose as for an encoder at batch 128, at the least size: widths that lead to the
same tiles, and as many rows as it takes for several trips of a persistent program, for several groups of partial sums,
for a split product. ``tests/kernels/test_launches.py`` holds them against the launches that the encoders request.
"""

from __future__ import annotations

import dataclasses
import math
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
    used: tuple[int, ...] | None = None
    """Results with a gradient; None: all."""


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Values that depend on the shape alone, whatever torch's default dtype is."""
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _hidden(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.6


def _mask_tokens(b: int, h: int, w: int, c: int, norm: bool = True, pos: bool = False) -> dict[str, Any]:
    given = {"tokens": normal(b, h, w, c), "mask": _hidden(b, h, w), "mask_token": normal(c)}
    given |= {"norm_weight": 1 + normal(c, scale=0.1), "norm_bias": normal(c)} if norm else {}
    return given | ({"pos_embed": normal(h, w, c)} if pos else {})


def _pixels(b: int, n: int, stride: int, cell: int) -> dict[str, Any]:
    edge = stride * n
    return {"target": normal(b, 3, edge, edge), "mask": _hidden(b, edge // cell, edge // cell), "stride": stride}


def _masked_l1(b: int, n: int) -> dict[str, Any]:
    return {"prediction": normal(b, n, n, 3 * 32**2), **_pixels(b, n, 32, 4)}


def _unshuffle(b: int, patches: int, kept: int, c: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(patches)
    order = torch.rand((b, patches), generator=generator, dtype=torch.float32, device="cpu").argsort(1)
    places = torch.where(order < kept, order, -1)
    return {"tokens": normal(b, 1 + kept, c), "places": places, "mask_token": normal(c),
            "pos_embed": normal(1 + patches, c)}


def _linear_masked_l1(b: int, n: int, d: int, stride: int = 32, cell: int = 4, **more: Any) -> dict[str, Any]:
    k = 3 * stride**2
    return {**more, "tokens": normal(b, n, n, d), "weight": normal(k, d, scale=d**-0.5), "bias": normal(k),
            **_pixels(b, n, stride, cell)}


def _window_attention(shape: tuple[int, int, int], heads: int, edge: int, shift: int, cosine: bool) -> dict[str, Any]:
    given = {"qkv": normal(*shape, 3 * heads * 32), "bias": normal(heads, edge**2, edge**2), "num_heads": heads,
             "window_size": (edge, edge), "shift_size": (shift, shift)}
    return given | ({"logit_scale": 2 + normal(heads, scale=0.1)} if cosine else {})


def _visible_attention(batch: int, windows: int, heads: int, edge: int, cosine: bool) -> dict[str, Any]:
    """Two of five places of the windows are taken."""
    n = edge**2
    given = _window_attention((1, edge, edge), heads, edge, 0, cosine)
    at = torch.arange(windows * n, device="cpu") * 7919 % (windows * n)
    tokens = windows * n * 2 // 5
    slots = torch.where(at < tokens, at, -1).view(1, windows, n).repeat(batch, 1, 1)
    places = (slots == -1).to(torch.uint8).argsort(dim=2, stable=True)
    groups = torch.arange(windows * n, device="cpu").view(windows, n) // 5 % 2
    return {"qkv": normal(batch, tokens, 3 * heads * 32), "slots": slots.gather(2, places), "places": places,
            "groups": groups, "num_heads": heads, **{k: given[k] for k in ("bias", "logit_scale") if k in given}}


def _residual_norm(shape: tuple[int, ...], order: str, *, residual: bool = True, branch: bool = True,
                   bias: bool = False, gamma: bool = False, drop: bool = True, **settings: Any) -> dict[str, Any]:
    c = shape[-1]
    given: dict[str, Any] = {"residual": None, "branch": None, "order": order, "weight": 1 + normal(c, scale=0.1),
                             "bias": normal(c), **settings}
    given |= {"residual": normal(*shape)} if residual else {}
    given |= {"branch": normal(*reversed(shape)).reshape(shape)} if branch else {}
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


def _table_bias(edge: int, heads: int) -> dict[str, Any]:
    table = (2 * edge - 1) ** 2
    return {"table": normal(table, heads),
            "index": torch.arange(edge**4, device="cpu").reshape(edge**2, edge**2) % table}


def _low_copies(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    return {"tensors": [normal(*shape) for shape in shapes], "dtype": dtype}


def _distillation(student: tuple[int, ...], teacher: tuple[int, ...], pairs: str, weighted: bool) -> dict[str, Any]:
    given = {"student": normal(*student, scale=2.0), "teacher": normal(*reversed(teacher)).reshape(teacher),
             "centre": normal(student[-1], scale=0.5), "student_temp": 0.1, "teacher_temp": 0.05, "pairs": pairs}
    if weighted:  # of some rows 0, together about 1
        given["weight"] = _hidden(*student[:-1]).float() / math.prod(student[:-1])
    return given


def _tensor(name: str, *shape: int, **more: Any) -> dict[str, Any]:
    return {name: normal(*shape), **more}


_TOKENS = ("tokens", "mask_token", "norm_weight", "norm_bias")
_NORM = ("residual", "branch", "weight", "bias")
_MLP = ("x", "weight1", "bias1", "weight2", "bias2")
_LINEAR = ("x", "weight", "bias")
_HEAD = ("tokens", "weight", "bias")
_COSINE = ("qkv", "bias", "logit_scale")
_LOGITS = ("student", "teacher")
_MAE: dict[str, Any] = {"loss": "l2", "target_eps": 1e-6, "count_eps": 0.0}
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
    Case("visible_attention", "scaled dot", partial(_visible_attention, 2, 3, 2, 6, False), ("qkv",), ("qkv", "bias")),
    Case("visible_attention", "cosine", partial(_visible_attention, 1, 2, 2, 9, True), ("qkv",), _COSINE),
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
    Case("linear_masked_l1", "patch statistics", partial(_linear_masked_l1, 3, 2, 40, 19, 19, **_MAE), ("tokens",),
         _HEAD),
    Case("unshuffle", "", partial(_unshuffle, 3, 30, 7, 40), ("tokens",), ("tokens", "mask_token", "pos_embed")),
    Case("distillation", "rows", partial(_distillation, (37, 300), (37, 300), "rows", True), _LOGITS, ("student",)),
    Case("distillation_and_entropy", "views", partial(_distillation, (5, 3, 300), (2, 3, 300), "views", False), _LOGITS,
         ("student",), used=(0,)),
    Case("local_norm_target", "", partial(_tensor, "images", 2, 3, 33, 50, kernel_size=13), (), (), torch.float32),
    Case("low_copies", "bfloat16", partial(_low_copies, _PIECES, torch.bfloat16), (), (), torch.bfloat16),
    Case("low_copies", "float16", partial(_low_copies, _PIECES, torch.float16), (), (), torch.float16))



def _attention(edge: int, shift: int, cosine: bool) -> Case:
    """More windows than programs."""
    names = _COSINE if cosine else ("qkv", "bias")
    return Case("window_attention", f"{'cosine' if cosine else 'scaled dot'}, {edge}x{edge}, shifted by {shift}",
                partial(_window_attention, (10, 24, 24), 8, edge, shift, cosine), ("qkv",), names)


def _norm(variant: str, order: str, c: int = 256, used: tuple[int, ...] | None = None, **given: Any) -> Case:
    """2²⁰ values up to the next power of two of ``c``: on each multiprocessor, more rows than programs at once."""
    rows = (1 << 20) // (1 << (c - 1).bit_length())
    stream = [n for n in ("residual", "branch") if given.get(n, True)]
    extra = [name for key, name in (("bias", "branch_bias"), ("gamma", "gamma")) if given.get(key)]
    build = partial(_residual_norm, (rows // 64, 8, 8, c), order, **{"drop": False, **given})
    return Case("residual_norm", variant, build, tuple(stream), (*stream, "weight", "bias", *extra), None, used)


def _embed(b: int, edge: int, c: int, norm: bool = True) -> Case:
    build = partial(_mask_tokens, b, edge, edge, c, norm)
    return Case("mask_tokens", f"{c} channels{', norm' * norm}", build, ("tokens",), _TOKENS if norm else _TOKENS[:2])


def _layer(rows: int, c: int, out: int) -> Case:
    return Case("linear_and_input", f"{rows} x {c} to {out}", partial(_linear, rows, c, out), ("x",), _LINEAR)


def _two_layers(rows: int, c: int) -> Case:
    return Case("mlp", f"{rows} x {c}", partial(_mlp, rows, c), ("x",), _MLP)


def _merge(b: int, c: int) -> Case:
    def build() -> dict[str, Any]:
        return {"x": normal(b, 32, 32, c), "weight": 1 + normal(4 * c, scale=0.1), "bias": normal(4 * c)}

    return Case("patch_merge", f"{c} channels, norm", build, ("x",), _LINEAR)


SHIPPED: tuple[Case, ...] = (
    *(_attention(*shape) for shape in ((6, 0, False), (6, 3, False), (6, 0, True), (12, 0, True), (12, 6, True))),
    # Every tile of rows, whole and padded.
    *(_norm(f"post, {c} channels", "post", c, (0,), bias=True)
      for c in (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2816, 4096)),
    # Every set of tensors. "post" without a residual begins a stream, "pre" without a branch normalises one.
    _norm("post, drop path", "post", used=(0,), bias=True, drop=True),
    _norm("post, merged", "post", used=(0,), bias=True, merge=True),
    _norm("post, merged, drop path", "post", used=(0,), bias=True, merge=True, drop=True),
    _norm("post, begun, merged", "post", used=(0,), residual=False, merge=True),
    _norm("post, begun, second reader", "post", used=(1,), residual=False),
    _norm("pre, bias", "pre", bias=True),
    _norm("pre, bias, last", "pre", used=(1,), bias=True),
    _norm("pre, no branch", "pre", branch=False),
    _norm("pre, gamma", "pre", gamma=True),
    _norm("pre, gamma, last", "pre", used=(1,), gamma=True),
    _norm("pre, gamma, drop path", "pre", gamma=True, drop=True),
    _norm("pre, gamma, drop path, last", "pre", used=(1,), gamma=True, drop=True),
    # Groups of programs with partial sums; from 16 images on, several programs for a position.
    _embed(16, 20, 128), _embed(16, 12, 192), _embed(8, 12, 352), _embed(8, 12, 512), _embed(16, 12, 768, False),
    # Row blocks beyond a group of tiles; the weight's gradient in one part, a few, and two levels of parts.
    _layer(1152, 352, 1056), _layer(256, 256, 384), _layer(1152, 256, 384), _layer(4096, 128, 384),
    _layer(4096, 256, 256), _layer(4096, 48, 192), _layer(256, 192, 576), _layer(4096, 192, 576), _layer(4096, 48, 128),
    # Beyond 64 row blocks their sums are added in groups.
    _two_layers(8320, 160), _two_layers(8320, 128), _two_layers(8320, 256), _two_layers(1152, 256),
    _merge(7, 128), _merge(4, 256), _merge(4, 512),
    *(Case("cpb_bias", f"{heads} heads", partial(_cpb_bias, 6, heads, 1), (), ("weight1", "bias1", "weight2"),
           torch.float32) for heads in (32, 48, 128)),
    Case("table_bias", "", partial(_table_bias, 6, 32), (), ("table",), torch.float32),
    # More tokens than get their places at a time; slopes of more than a chunk, in the first in float32 only.
    Case("linear_masked_l1", "4,352 tokens of 32 px", partial(_linear_masked_l1, 68, 8, 64), ("tokens",), _HEAD),
    Case("linear_masked_l1", "22,176 tokens of 16 px", partial(_linear_masked_l1, 154, 12, 64, 16, 16), ("tokens",),
         _HEAD),
    Case("linear_masked_l1", "300 tokens of MAE", partial(_linear_masked_l1, 300, 1, 64, 16, 16, **_MAE), ("tokens",),
         _HEAD),
    # The decoder of MAE: several images for a program, groups of partial sums.
    Case("unshuffle", "16 images", partial(_unshuffle, 16, 196, 49, 512), ("tokens",), ("tokens", "mask_token")),
    # Several groups of a program; more codes than one program has, and as many chunks as DINO's.
    Case("distillation", "800 rows of 8,192", partial(_distillation, (800, 8192), (800, 8192), "rows", True), _LOGITS,
         ("student",)),
    Case("distillation", "12 views of 8,192", partial(_distillation, (12, 40, 8192), (2, 40, 8192), "views", False),
         _LOGITS, ("student",)),
    Case("distillation", "10 views of 65,536", partial(_distillation, (10, 4, 65536), (2, 4, 65536), "views", False),
         _LOGITS, ("student",)),
    Case("local_norm_target", "192 px", partial(_tensor, "images", 2, 3, 192, 192, kernel_size=47), (), (),
         torch.float32))

_B, _H, _C = 64, 48, 128
# A stage of Swin-B.
TIMED: dict[tuple[str, str], Build] = {
    ("mask_tokens", "norm"): partial(_mask_tokens, _B, _H, _H, _C),
    ("residual_norm", "pre"): partial(_residual_norm, (_B, _H, _H, _C), "pre"),
    ("residual_norm", "post"): partial(_residual_norm, (_B, _H, _H, _C), "post"),
    ("window_attention", "scaled dot"): partial(_window_attention, (32, _H, _H), 4, 6, 3, False),
    ("window_attention", "cosine"): partial(_window_attention, (32, _H, _H), 4, 6, 3, True),
    ("window_attention", "cosine, 144 tokens"): partial(_window_attention, (32, _H, _H), 4, 12, 6, True),
    ("visible_attention", "scaled dot"): partial(_visible_attention, 32, _H * _H // 36, 4, 6, False),
    ("visible_attention", "cosine"): partial(_visible_attention, 32, _H * _H // 144, 4, 12, True),
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
    ("linear_masked_l1", "patch statistics"): partial(_linear_masked_l1, _B * 147, 1, 512, 16, 16, **_MAE),
    ("unshuffle", ""): partial(_unshuffle, _B, 196, 49, 512),
    ("distillation", "rows"): partial(_distillation, (2048, 8192), (2048, 8192), "rows", True),
    ("distillation_and_entropy", "views"): partial(_distillation, (12, _B, 8192), (2, _B, 8192), "views", False),
    ("local_norm_target", ""): partial(_tensor, "images", _B, 3, 192, 192, kernel_size=47),
    ("low_copies", "bfloat16"): partial(_low_copies, [(4096, 1024), (1024,)] * 24, torch.bfloat16),
    ("low_copies", "float16"): partial(_low_copies, [(4096, 1024), (1024,)] * 24, torch.float16)}
"""Inputs that are worth timing, of each of :data:`SMALL`."""
