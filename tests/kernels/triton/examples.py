"""Every op with every tensor that it takes, in small odd shapes, for the checks that all kernels have to pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastmim_kernels as fk

F32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Example:
    """One call of one op of :mod:`fastmim_kernels`.

    Attributes:
        op: Its name.
        variant: What is special about it, unique for the op.
        build: Makes the keyword arguments, the same ones every time.
        grads: Names of those whose gradients are asked for.
    """

    op: str
    variant: str
    build: Callable[[], dict[str, Any]]
    grads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}: {self.variant}" if self.variant else self.op


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + sum(shape) + len(shape))
    return (scale * torch.randn(shape, generator=generator, device="cpu")).to(dtype)


def cotangent_of(output: Tensor) -> Tensor:
    """Other values than those of an input of the same shape: a norm's gradient would be all cancellation."""
    return normal(*output.shape, seed=1).to(output)


def positive(*shape: int) -> Tensor:
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu")


def hidden(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape) + 1), device="cpu") < 0.6


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), device="cpu").byte()


# 5x7 positions of 24 channels fill no block; 17 images make two programs of unequal work.
def _mask_tokens(norm: bool, pos: bool, batch: int = 3) -> dict[str, Any]:
    shape, c = (batch, 5, 7), 24
    norms = {"norm_weight": positive(c), "norm_bias": normal(c)} if norm else {}
    return {"tokens": normal(*shape, c), "mask": hidden(*shape), "mask_token": normal(1, c), **norms,
            **({"pos_embed": normal(5, 7, c)} if pos else {})}


# 7 of 11 patches hidden; 24 channels and 12 rows fill no block, 17 images make two programs of unequal work.
def _unshuffle(batch: int) -> dict[str, Any]:
    order = normal(batch, 11).argsort(1).argsort(1)
    return {"tokens": normal(batch, 5, 24), "places": torch.where(order < 4, order, -1), "mask_token": normal(1, 24),
            "pos_embed": normal(12, 24)}


# 105 rows of 40 channels: two programs of unequal work, and a padded row.
def _residual_norm(order: str, names: str, dtype: torch.dtype = F32) -> dict[str, Any]:
    shape, c = (3, 5, 7), 40
    every = {"drop_scale": positive(3) - 0.5, "gamma": positive(c), "branch_bias": normal(c),
             "residual": normal(*shape, c), "branch": normal(*shape, c, scale=2.0, dtype=dtype)}
    chosen = {n: every.get(n) for n in ("residual", "branch", *every) if n in names.split() + ["residual", "branch"]}
    chosen |= {"residual": None} if "no-residual" in names else {}
    chosen |= {"branch": None} if "no-branch" in names else {}
    return {**chosen, "weight": positive(c), "bias": normal(c), "order": order}


def _merge() -> dict[str, Any]:
    return {"residual": normal(3, 6, 10, 24), "branch": normal(3, 6, 10, 24, scale=2.0), "weight": positive(24),
            "bias": normal(24), "order": "post", "merge": True, "drop_scale": positive(3), "out_dtype": F32}


def _patch_merge(norm: bool) -> dict[str, Any]:
    return {"x": normal(2, 11, 9, 24), **({"weight": positive(96), "bias": normal(96)} if norm else {})}


def _linear(dtype: torch.dtype, rows: int = 39, low: bool = False) -> dict[str, Any]:
    given = {"x": normal(rows, 24, dtype=dtype), "weight": normal(40, 24, scale=0.2), "bias": normal(40)}
    return given | ({f"low_{n}": given[n].to(dtype) for n in ("weight", "bias")} if low else {})


def _mlp(dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    given = {"x": normal(3, 13, 24, dtype=dtype), "weight1": normal(40, 24, scale=0.2), "bias1": normal(40),
             "weight2": normal(16, 40, scale=0.2), "bias2": normal(16)}
    if more.pop("low", False):
        given |= {f"low_{n}": given[n].to(dtype) for n in ("weight1", "weight2")}
    return given | more


# Tokens that reach beyond the image, cells of 3x4 pixels within tokens of 8.
def _loss(dtype: torch.dtype, linear: bool, **more: Any) -> dict[str, Any]:
    image = pixels(3, 2, 12, 20) if dtype == torch.uint8 else normal(3, 2, 12, 20)
    given = {"target": image, "mask": hidden(3, 4, 5), "stride": 8, **more}
    given |= {"mean": positive(2), "std": positive(2)} if dtype == torch.uint8 else {}
    if linear:
        return given | {"tokens": normal(3, 2, 3, 11), "weight": normal(128, 11), "bias": normal(128)}
    return given | {"prediction": normal(3, 2, 3, 128)}


def _patch_loss() -> dict[str, Any]:
    image = {"target": normal(3, 2, 16, 24), "mask": hidden(3, 2, 3), "stride": 8, "loss": "l2", "target_eps": 1e-6}
    return image | {"tokens": normal(3, 2, 3, 11), "weight": normal(128, 11), "bias": normal(128)}


def _bias(mlp: bool) -> dict[str, Any]:
    coords, heads, edges = [normal(9, 2), normal(25, 2)], (1, 3), (2, 3)
    index = [torch.arange(e**4, device="cpu").reshape(e * e, e * e) % len(c)
             for e, c in zip(edges, coords, strict=True)]
    plan, blocks = fk.bias_plan(index, [1, 2], heads, [9, 25], coords if mlp else None, 20)
    each = [(normal(20, 2), normal(20), normal(b.heads, 20, scale=0.1)) if mlp else (normal(b.rows, b.heads),)
            for b in blocks]
    return {"plan": plan, "blocks": blocks, "params": each}


def _attention(window: tuple[int, int], shape: tuple[int, int, int], heads: int, cosine: bool,
               dtype: torch.dtype = F32) -> dict[str, Any]:
    n = window[0] * window[1]
    given = {"qkv": normal(*shape, 3 * heads * 16, dtype=dtype), "bias": normal(heads, n, n), "num_heads": heads,
             "window_size": window, "shift_size": (window[0] // 2, window[1] // 2)}
    return given | ({"logit_scale": positive(heads, 1, 1)} if cosine else {})


# Two windows of 3x3 places of which 7 tokens take some, one of them padded: neither fills a block.
def _visible(cosine: bool, dtype: torch.dtype = F32) -> dict[str, Any]:
    held = torch.full((2, 2, 9), -1, device="cpu")
    held[:, 0, 0] = -2
    held[0, :, 3:7] = torch.tensor([[0, 5, 2, 6], [1, 3, 4, -1]], device="cpu")
    held[1, 1, :7] = torch.arange(7, device="cpu")
    places = (held == -1).int().argsort(dim=2, stable=True)
    given = {"qkv": normal(2, 7, 3 * 2 * 16, dtype=dtype), "bias": normal(2, 9, 9), "slots": held.gather(2, places),
             "places": places, "num_heads": 2, "groups": torch.arange(18, device="cpu").view(2, 9) // 5 % 2,
             "padding": normal(3 * 2 * 16)}
    return given | ({"logit_scale": positive(2, 1, 1)} if cosine else {})


# Of 5 images all views are hidden in one, some in others; 300 codes are one chunk that is not full.
def _distillation(pairs: str, codes: int, dtype: torch.dtype = F32) -> dict[str, Any]:
    student, teacher = ((3, 5, codes), (2, 5, codes)) if pairs == "views" else ((9, codes), (9, codes))
    weight = positive(*student[:-1]) * ~hidden(*student[:-1])
    weight[..., 1] = 0
    return {"student": normal(*student, dtype=dtype), "teacher": normal(*teacher, dtype=dtype, seed=2),
            "centre": normal(1, codes), "student_temp": 0.1, "teacher_temp": 0.5, "pairs": pairs, "weight": weight}


_ATTENTION = (
    Example("window_attention", "float32", lambda: _attention((3, 4), (1, 6, 8), 1, False), ("qkv", "bias")),
    Example("window_attention", "bfloat16, cosine", lambda: _attention((3, 4), (1, 6, 8), 2, True, BF16),
            ("qkv", "bias", "logit_scale")),
    Example("window_attention", "bfloat16, 81 tokens", lambda: _attention((9, 9), (1, 9, 18), 1, True, BF16),
            ("qkv", "bias", "logit_scale")))

_NORM = ("norm_weight", "norm_bias")
_LINEAR = ("x", "weight", "bias")
_MLP = ("x", "weight1", "bias1", "weight2", "bias2")
_HEAD = ("tokens", "weight", "bias")

EXAMPLES = (
    Example("mask_tokens", "plain", lambda: _mask_tokens(False, False), ("tokens", "mask_token")),
    Example("mask_tokens", "norm", lambda: _mask_tokens(True, False, 17), ("tokens", "mask_token", *_NORM)),
    Example("mask_tokens_twice", "norm, positions", lambda: _mask_tokens(True, True),
            ("tokens", "mask_token", *_NORM, "pos_embed")),
    Example("residual_norm", "pre, all", lambda: _residual_norm("pre", "drop_scale gamma branch_bias"),
            ("residual", "branch", "weight", "bias", "gamma", "branch_bias")),
    Example("residual_norm", "pre, bfloat16", lambda: _residual_norm("pre", "", BF16),
            ("residual", "branch", "weight", "bias")),
    Example("residual_norm", "pre, no branch", lambda: _residual_norm("pre", "no-branch"),
            ("residual", "weight", "bias")),
    Example("residual_norm", "post, all", lambda: _residual_norm("post", "drop_scale branch_bias"),
            ("residual", "branch", "weight", "bias", "branch_bias")),
    Example("residual_norm", "post, no residual", lambda: _residual_norm("post", "no-residual"),
            ("branch", "weight", "bias")),
    Example("residual_norm", "post, merge", _merge, ("residual", "branch", "weight", "bias")),
    Example("layer_norm", "", lambda: {"x": normal(3, 5, 40), "weight": positive(40), "bias": normal(40)}, _LINEAR),
    Example("patch_merge", "plain", lambda: _patch_merge(False), ("x",)),
    Example("patch_merge", "norm", lambda: _patch_merge(True), _LINEAR),
    Example("gelu", "plain", lambda: {"x": normal(105, 300)}, ("x",)),
    Example("gelu", "bias", lambda: {"x": normal(3, 7, 24), "bias": normal(24)}, ("x", "bias")),
    Example("linear", "", lambda: _linear(F32), _LINEAR),
    Example("linear", "1,100 rows, split", lambda: _linear(BF16, 1100), _LINEAR),
    Example("linear_and_input", "low copies", lambda: _linear(BF16, low=True), _LINEAR),
    Example("mlp", "", lambda: _mlp(F32), _MLP),
    Example("mlp", "recomputed", lambda: _mlp(BF16, recompute_fc1=True), _MLP),
    Example("mlp_and_input", "low copies", lambda: _mlp(BF16, low=True), _MLP),
    Example("masked_l1", "float32", lambda: _loss(F32, False), ("prediction",)),
    Example("masked_l1", "uint8", lambda: _loss(torch.uint8, False, loss="smooth_l1"), ("prediction",)),
    Example("linear_masked_l1", "float32", lambda: _loss(F32, True), _HEAD),
    Example("linear_masked_l1", "uint8", lambda: _loss(torch.uint8, True, loss="l2"), _HEAD),
    Example("linear_masked_l1", "patch statistics", _patch_loss, _HEAD),
    Example("unshuffle", "", lambda: _unshuffle(3), ("tokens", "mask_token")),
    Example("unshuffle", "positions", lambda: _unshuffle(17), ("tokens", "mask_token", "pos_embed")),
    Example("visible_attention", "float32", lambda: _visible(False), ("qkv", "bias", "padding")),
    Example("visible_attention", "bfloat16, cosine", lambda: _visible(True, BF16),
            ("qkv", "bias", "padding", "logit_scale")),
    Example("distillation", "rows, bfloat16", lambda: _distillation("rows", 300, BF16), ("student",)),
    Example("distillation_and_entropy", "views", lambda: _distillation("views", 300), ("student",)),
    Example("local_norm_target", "", lambda: {"images": normal(2, 3, 9, 13), "kernel_size": 5}),
    Example("position_bias", "MLP", lambda: _bias(True), ("params",)),
    Example("position_bias", "tables", lambda: _bias(False), ("params",)),
    Example("low_copies", "", lambda: {"tensors": [normal(130, 129), normal(37), normal(1)], "dtype": BF16}),
    *_ATTENTION)


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def leaves_of(example: Example, given: dict[str, Any]) -> list[Tensor]:
    """The tensors whose gradients are asked for."""
    return tensors_of([given[n] for n in example.grads])


def with_leaves(example: Example, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with fresh leaves of autograd, in the same memory."""
    return given | {n: tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), given[n]) for n in example.grads}


def run(example: Example, impl: str, given: dict[str, Any] | None = None,
        cotangent: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients; ``cotangent`` makes the gradient of an output."""
    given = with_leaves(example, example.build() if given is None else given)
    outputs = tensors_of(getattr(fk, example.op)(**given, impl=impl))
    found = [o.detach().clone() for o in outputs]
    if not example.grads:
        return found
    outputs = [o for o in outputs if o.requires_grad]
    cotangents = [(cotangent or cotangent_of)(o) for o in outputs]
    return found + list(torch.autograd.grad(outputs, leaves_of(example, given), cotangents))


def names(examples: Sequence[Example]) -> list[str]:
    return [e.name for e in examples]
