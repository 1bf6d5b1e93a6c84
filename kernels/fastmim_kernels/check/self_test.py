"""Whether a Triton kernel is right on this GPU, asked once before ``impl="auto"`` first relies on it.

Every op has examples small enough to run at first use: forward and every gradient are compared with the float64
oracle in each precision. A kernel that is wrong, or does not compile, is replaced by torch with one loud warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..linear.op import linear, linear_and_input
from ..local_norm.op import local_norm_target
from ..low_copies.op import low_copies
from ..mask_tokens.op import mask_tokens, mask_tokens_twice
from ..masked_loss.linear_op import linear_masked_l1
from ..masked_loss.op import masked_l1
from ..mlp.gelu import gelu
from ..mlp.op import mlp, mlp_and_input
from ..patch_merge.op import patch_merge
from ..position_bias.op import cpb_bias
from ..residual_norm.op import layer_norm, residual_norm
from ..window_attention.op import window_attention

OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        cpb_bias,
        gelu,
        layer_norm,
        linear,
        linear_and_input,
        linear_masked_l1,
        local_norm_target,
        low_copies,
        mask_tokens,
        mask_tokens_twice,
        masked_l1,
        mlp,
        mlp_and_input,
        patch_merge,
        residual_norm,
        window_attention,
    )
}

FACTOR, FLOOR = 4.0, 1e-6
"""Wider than the tests' rule on errors (2 x plain torch): what is looked for is a kernel that is wrong."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_EXAMPLES_OF = {"position_bias": "cpb_bias"}
"""The op whose examples run the kernel, where it is another's."""

_failures: dict[tuple[str, tuple[int, int]], str] = {}
"""By op and compute capability: why the kernel failed, empty where it did not."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One of :data:`OPS` on made-up inputs."""

    op: str
    variant: str
    build: Callable[[bool], dict[str, Any]]
    """``build(large)`` → keyword arguments, tensors or lists of them, float ones in float32 on the CPU."""
    low: tuple[str, ...]
    """Arguments that come in the low precision; parameters stay float32."""
    grads: tuple[str, ...]


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _hidden(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.6


# The odd sizes leave a remainder in every tile; the large ones are a stage of Swin-B.
def _mask_tokens(large: bool) -> dict[str, Any]:
    b, h, w, c = (64, 48, 48, 128) if large else (3, 6, 5, 40)
    return {
        "tokens": _normal(b, h, w, c),
        "mask": _hidden(b, h, w),
        "mask_token": _normal(c),
        "norm_weight": 1 + _normal(c, scale=0.1),
        "norm_bias": _normal(c),
    }


def _masked_l1(large: bool) -> dict[str, Any]:
    b, n = (64, 6) if large else (3, 2)
    return {
        "prediction": _normal(b, n, n, 3 * 32**2),
        "target": _normal(b, 3, 32 * n, 32 * n),
        "mask": _hidden(b, 8 * n, 8 * n),
        "stride": 32,
    }


def _linear_masked_l1(large: bool) -> dict[str, Any]:
    b, n, d = (64, 6, 1024) if large else (3, 2, 40)
    return {
        "tokens": _normal(b, n, n, d),
        "weight": _normal(3 * 32**2, d, scale=d**-0.5),
        "bias": _normal(3 * 32**2),
        "target": _normal(b, 3, 32 * n, 32 * n),
        "mask": _hidden(b, 8 * n, 8 * n),
        "stride": 32,
    }


def _window_attention(large: bool, cosine: bool, edge: int) -> dict[str, Any]:
    b, h, w, heads, d = (32, 48, 48, 4, 32) if large else (1, 24, 12, 2, 32)
    out = {
        "qkv": _normal(b, h, w, 3 * heads * d),
        "bias": _normal(heads, edge**2, edge**2),
        "num_heads": heads,
        "window_size": (edge, edge),
        "shift_size": (edge // 2, edge // 2),
    }
    return out | ({"logit_scale": 2 + _normal(heads, scale=0.1)} if cosine else {})


def _residual_norm(large: bool, order: str) -> dict[str, Any]:
    shape = (64, 48, 48, 128) if large else (3, 5, 7, 72)
    c = shape[-1]
    return {
        "residual": _normal(*shape),
        "branch": _normal(*reversed(shape)).reshape(shape),
        "order": order,
        "weight": 1 + _normal(c, scale=0.1),
        "bias": _normal(c),
        "drop_scale": 1.25 * (~_hidden(shape[0])).float(),
    }


def _layer_norm(large: bool) -> dict[str, Any]:
    shape = (64, 48, 48, 128) if large else (3, 5, 7, 72)
    return {"x": _normal(*shape), "weight": 1 + _normal(shape[-1], scale=0.1), "bias": _normal(shape[-1])}


def _patch_merge(large: bool) -> dict[str, Any]:
    return {"x": _normal(*((64, 48, 48, 128) if large else (3, 5, 6, 40)))}


def _gelu(large: bool) -> dict[str, Any]:
    rows, c = (64 * 48 * 48, 512) if large else (37, 72)
    return {"x": _normal(rows, c), "bias": _normal(c)}


def _mlp(large: bool) -> dict[str, Any]:
    rows, c = (64 * 48 * 48, 128) if large else (37, 24)
    return {
        "x": _normal(rows, c),
        "weight1": _normal(4 * c, c, scale=c**-0.5),
        "bias1": _normal(4 * c),
        "weight2": _normal(c, 4 * c, scale=c**-0.5),
        "bias2": _normal(c),
    }


def _linear(large: bool) -> dict[str, Any]:
    rows, c = (64 * 48 * 48, 128) if large else (37, 24)
    return {"x": _normal(rows, c), "weight": _normal(3 * c, c, scale=c**-0.5), "bias": _normal(3 * c)}


def _local_norm_target(large: bool) -> dict[str, Any]:
    return {"images": _normal(*((64, 3, 192, 192) if large else (2, 3, 33, 50))), "kernel_size": 47 if large else 13}


def _cpb_bias(large: bool) -> dict[str, Any]:
    edge, heads, depth = (12, 16, 18) if large else (3, 2, 2)
    table = (2 * edge - 1) ** 2
    index = torch.arange(edge**4).reshape(edge**2, edge**2) % table
    return {
        "coords": _normal(table, 2),
        "index": index,
        "weight1": _normal(depth, 512, 2),
        "bias1": _normal(depth, 512),
        "weight2": _normal(depth, heads, 512, scale=0.05),
    }


def _low_copies(large: bool, dtype: torch.dtype) -> dict[str, Any]:
    # More than one piece of a program, a remainder of a vector, and less than one.
    shapes = [(4096, 1024), (1024,)] * 24 if large else [(130, 129), (37,), (1,)]
    return {"tensors": [_normal(*shape) for shape in shapes], "dtype": dtype}


CASES = (
    Case("mask_tokens", "norm", _mask_tokens, ("tokens",), ("tokens", "mask_token", "norm_weight", "norm_bias")),
    Case(
        "residual_norm",
        "pre",
        lambda large: _residual_norm(large, "pre"),
        ("branch",),
        ("residual", "branch", "weight", "bias"),
    ),
    Case(
        "residual_norm",
        "post",
        lambda large: _residual_norm(large, "post"),
        ("branch",),
        ("residual", "branch", "weight", "bias"),
    ),
    # Up to 64 tokens and beyond run different kernels.
    Case(
        "window_attention", "scaled dot", lambda large: _window_attention(large, False, 6), ("qkv",), ("qkv", "bias")
    ),
    Case(
        "window_attention",
        "cosine",
        lambda large: _window_attention(large, True, 6),
        ("qkv",),
        ("qkv", "bias", "logit_scale"),
    ),
    Case(
        "window_attention",
        "cosine, 144 tokens",
        lambda large: _window_attention(large, True, 12),
        ("qkv",),
        ("qkv", "bias", "logit_scale"),
    ),
    Case("mlp", "", _mlp, ("x",), ("x", "weight1", "bias1", "weight2", "bias2")),
    Case("linear", "", _linear, ("x",), ("x", "weight", "bias")),
    Case("mlp_and_input", "", _mlp, ("x",), ("x", "weight1", "bias1", "weight2", "bias2")),
    Case("linear_and_input", "", _linear, ("x",), ("x", "weight", "bias")),
    Case("layer_norm", "", _layer_norm, ("x",), ("x", "weight", "bias")),
    Case("mask_tokens_twice", "norm", _mask_tokens, ("tokens",), ("tokens", "mask_token", "norm_weight", "norm_bias")),
    Case("gelu", "bias", _gelu, ("x",), ("x", "bias")),
    Case("patch_merge", "", _patch_merge, ("x",), ("x",)),
    Case("cpb_bias", "", _cpb_bias, (), ("weight1", "bias1", "weight2")),
    Case("masked_l1", "", _masked_l1, ("prediction",), ("prediction",)),
    Case("linear_masked_l1", "", _linear_masked_l1, ("tokens",), ("tokens", "weight", "bias")),
    Case("local_norm_target", "", _local_norm_target, (), ()),
    Case("low_copies", "bfloat16", lambda large: _low_copies(large, torch.bfloat16), (), ()),
    Case("low_copies", "float16", lambda large: _low_copies(large, torch.float16), (), ()),
)


def inputs_of(arguments: dict[str, Any], dtypes: dict[str, torch.dtype], device: torch.device) -> dict[str, Any]:
    moved = {name: _to(value, device) for name, value in arguments.items()}
    return moved | {name: moved[name].to(dtype) for name, dtype in dtypes.items()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def run_case(
    case: Case, arguments: dict[str, Any], dtypes: dict[str, torch.dtype], device: torch.device, impl: str
) -> list[Tensor]:
    """Outputs and gradients of a fixed cotangent."""
    inputs = inputs_of(arguments, dtypes, device)
    for name in case.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = listed(OPS[case.op](**inputs, impl=impl))
    if case.grads:
        cotangents = [_normal(*o.shape).to(device, o.dtype) for o in outputs]
        outputs += torch.autograd.grad(outputs, [inputs[n] for n in case.grads], cotangents)
    return [o.detach() for o in outputs]


def errors(case: Case, device: torch.device, dtype: torch.dtype, impl: str) -> tuple[float, float]:
    """(error, limit) of the output or gradient that is nearest to its limit or furthest beyond it."""
    arguments = case.build(False)
    low = {name: dtype for name in case.low}
    rounded = {k: v.to(dtype).float() if k in low else v for k, v in arguments.items()}
    double = {k: torch.float64 for k, v in rounded.items() if isinstance(v, Tensor) and v.is_floating_point()}
    truth = run_case(case, rounded, double, torch.device("cpu"), "reference")
    plain = run_case(case, rounded, low, device, "reference")
    ours = run_case(case, rounded, low, device, impl)
    pairs = [(relative(o, t), FACTOR * relative(p, t) + FLOOR) for o, p, t in zip(ours, plain, truth, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def relative(value: Tensor, truth: Tensor) -> float:
    error = (value.cpu().double() - truth).square().mean().sqrt().item()
    scale = truth.square().mean().sqrt().item() or 1.0
    return error / scale if error == error else float("inf")


def failure(op: str, device: torch.device) -> str:
    """Why ``op``'s Triton kernel must not be used on ``device``; empty where it passed, or needs no test.

    Tested once per process and compute capability, on real tensors also within a trace.
    """
    capability = _capability(device)
    if capability is None:
        return ""
    key = op, capability
    if key not in _failures:
        _failures[key] = _test(op, device)
        if _failures[key]:
            warnings.warn(f"fastmim: the Triton kernel of {op} failed its self-test on sm_{key[1][0]}{key[1][1]} and "
                          f"impl='auto' falls back to torch: {_failures[key]}", RuntimeWarning, stacklevel=4)
    return _failures[key]


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU that is there; a trace may name one on a machine that has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def _test(op: str, device: torch.device) -> str:
    with _disable_current_modes(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for case in CASES:
            for dtype in DTYPES if case.op == _EXAMPLES_OF.get(op, op) else ():
                try:
                    error, limit = errors(case, device, dtype, "triton")
                except Exception as broken:  # a broken compiler or driver shows in many types
                    return f"{type(broken).__name__}: {' '.join(str(broken).split())[:300]}"
                if not error <= limit:
                    return f"error {error:.2g} in {dtype} against the float64 oracle, at most {limit:.2g} is expected"
    return ""
