"""``fastmim doctor``: what is installed, which implementation each op takes on this machine, and whether it is right.

Every op runs as training would run it (``impl="auto"``), forward and backward, in float32 and bfloat16, and is
compared with its float64 oracle; on a GPU it is timed too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim._version import __version__
from fastmim_kernels.dispatch import no_triton

OPTIONAL = ("triton", "deepspeed", "apex", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_NO_KERNEL = "torch is its only fast implementation"
FACTOR, FLOOR = 4.0, 1e-6
"""Wider than the tests' rule on errors (2 x plain torch): what is looked for is a kernel that is wrong."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op of :mod:`fastmim_kernels` on made-up inputs."""

    op: str
    variant: str
    build: Callable[[bool], dict[str, Any]]
    """``build(large)`` → keyword arguments, float ones in float32 on the CPU."""
    low: tuple[str, ...]
    """Arguments that come in the low precision; parameters stay float32."""
    grads: tuple[str, ...]


@dataclasses.dataclass
class Finding:
    """What became of one case; errors are relative and NaN when it raised, times None without a GPU."""

    op: str
    variant: str
    implementation: str
    reason: str
    error: float = float("nan")
    limit: float = float("nan")
    failure: str = ""
    forward_us: float | None = None
    backward_us: float | None = None
    gb_per_s: float | None = None

    @property
    def fell_back(self) -> bool:
        """There is a Triton kernel, and it will not run."""
        return self.implementation == "torch" and self.reason != _NO_KERNEL


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


def _window_attention(large: bool, cosine: bool) -> dict[str, Any]:
    b, h, w, heads, d, edge = (32, 48, 48, 4, 32, 12 if cosine else 6) if large else (2, 12, 18, 2, 16, 6)
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
    Case("window_attention", "scaled dot", lambda large: _window_attention(large, False), ("qkv",), ("qkv", "bias")),
    Case(
        "window_attention",
        "cosine",
        lambda large: _window_attention(large, True),
        ("qkv",),
        ("qkv", "bias", "logit_scale"),
    ),
    Case("mlp", "", _mlp, ("x",), ("x", "weight1", "bias1", "weight2", "bias2")),
    Case("linear", "", _linear, ("x",), ("x", "weight", "bias")),
    Case("gelu", "bias", _gelu, ("x",), ("x", "bias")),
    Case("patch_merge", "", _patch_merge, ("x",), ("x",)),
    Case("cpb_bias", "", _cpb_bias, (), ("weight1", "bias1", "weight2")),
    Case("masked_l1", "", _masked_l1, ("prediction",), ("prediction",)),
    Case("linear_masked_l1", "", _linear_masked_l1, ("tokens",), ("tokens", "weight", "bias")),
    Case("local_norm_target", "", _local_norm_target, (), ()),
)


def examine(device: torch.device) -> list[Finding]:
    """Run every case on ``device``."""
    return [_examine(case, device) for case in CASES]


def _examine(case: Case, device: torch.device) -> Finding:
    finding = Finding(case.op, case.variant, *_choice(case, device))
    try:
        error, limit = max(
            (_errors(case, device, dtype) for dtype in (torch.float32, torch.bfloat16)),
            key=lambda pair: pair[0] / pair[1],
        )
        finding.error, finding.limit = error, limit
        if not error <= limit:
            finding.failure = f"error {error:.2g} against the float64 oracle, at most {limit:.2g} is expected"
        elif device.type == "cuda":
            finding.forward_us, finding.backward_us, finding.gb_per_s = _speed(case, device)
    except Exception as broken:  # a broken compiler or driver shows in many types, and the other ops go on
        finding.failure = f"{type(broken).__name__}: {' '.join(str(broken).split())[:300]}"
    return finding


def _choice(case: Case, device: torch.device) -> tuple[str, str]:
    """(implementation that "auto" takes, why it is not Triton)."""
    with contextlib.suppress(Exception):  # "auto" would take Triton and fail in the same way: the check reports it
        try:
            _run(case, case.build(False), {}, device, "triton")
        except ValueError as error:
            reason = no_triton(device)
            return "torch", reason if reason and reason in str(error) else _NO_KERNEL
    return "triton", ""


def _inputs(arguments: dict[str, Any], dtypes: dict[str, torch.dtype], device: torch.device) -> dict[str, Any]:
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return moved | {name: moved[name].to(dtype) for name, dtype in dtypes.items()}


def _listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _run(
    case: Case, arguments: dict[str, Any], dtypes: dict[str, torch.dtype], device: torch.device, impl: str
) -> list[Tensor]:
    """Outputs and gradients of a fixed cotangent."""
    inputs = _inputs(arguments, dtypes, device)
    for name in case.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = _listed(getattr(fk, case.op)(**inputs, impl=impl))
    if case.grads:
        cotangents = [_normal(*o.shape).to(device, o.dtype) for o in outputs]
        outputs += torch.autograd.grad(outputs, [inputs[n] for n in case.grads], cotangents)
    return [o.detach() for o in outputs]


def _errors(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(error, limit) of the output or gradient that is nearest to its limit or furthest beyond it."""
    arguments = case.build(False)
    low = {name: dtype for name in case.low}
    rounded = {k: v.to(dtype).float() if k in low else v for k, v in arguments.items()}
    double = {k: torch.float64 for k, v in rounded.items() if isinstance(v, Tensor) and v.is_floating_point()}
    truth = _run(case, rounded, double, torch.device("cpu"), "reference")
    plain = _run(case, rounded, low, device, "reference")
    ours = _run(case, rounded, low, device, "auto")
    pairs = [(_relative(o, t), FACTOR * _relative(p, t) + FLOOR) for o, p, t in zip(ours, plain, truth, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _relative(value: Tensor, truth: Tensor) -> float:
    error = (value.cpu().double() - truth).square().mean().sqrt().item()
    scale = truth.square().mean().sqrt().item() or 1.0
    return error / scale if error == error else float("inf")


def _speed(case: Case, device: torch.device) -> tuple[float, float | None, float]:
    """(forward µs, backward µs or None, GB/s of forward) in bfloat16; bytes are those of inputs and outputs."""
    inputs = _inputs(case.build(True), {name: torch.bfloat16 for name in case.low}, device)
    op = getattr(fk, case.op)
    with torch.no_grad():
        outputs = _listed(op(**inputs))
        forward = _microseconds(lambda: op(**inputs))
    moved = sum(t.numel() * t.element_size() for t in [*inputs.values(), *outputs] if isinstance(t, Tensor))
    if not case.grads:
        return forward, None, moved / forward / 1e3
    wrt = [inputs[name].requires_grad_() for name in case.grads]
    outputs = _listed(op(**inputs))
    cotangents = [torch.ones_like(o) for o in outputs]
    backward = _microseconds(lambda: torch.autograd.grad(outputs, wrt, cotangents, retain_graph=True))
    return forward, backward, moved / forward / 1e3


def _microseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the GPU, after a few runs to warm up."""
    times = []
    for i in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


def versions() -> dict[str, str | None]:
    """Versions by name; None for what is not installed."""
    found: dict[str, str | None] = {
        "fastmim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
    }
    for name in ("torchvision", "timm", "numpy", *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[str]:
    """One line for the CPU and one for each GPU."""
    lines = [f"cpu: {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
    return lines


def doctor(as_json: bool = False) -> tuple[str, int]:
    """(report, exit status): 0 when everything runs as asked, 1 when an op fails or a GPU gets no Triton kernel."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = examine(device)
    wrong = [f for f in findings if f.failure or (f.fell_back and device.type == "cuda")]
    if as_json:
        ops = [dataclasses.asdict(f) | {"fell_back": f in wrong and f.fell_back} for f in findings]
        ops = [{k: None if v != v else v for k, v in op.items()} for op in ops]  # JSON has no NaN
        tree = {"versions": versions(), "devices": devices(), "device": device.type, "ops": ops, "ok": not wrong}
        return json.dumps(tree, indent=2) + "\n", int(bool(wrong))
    lines = [f"{name}: {version or 'not installed'}" for name, version in versions().items()]
    lines += ["", *devices(), "", f"ops on {device.type}, impl=auto:"]
    lines += [f"  {_line(f)}" for f in findings]
    verdict = f"{len(wrong)} of {len(findings)} did not run as asked" if wrong else "everything runs as asked"
    return "\n".join([*lines, "", verdict, ""]), int(bool(wrong))


def _line(finding: Finding) -> str:
    name = f"{finding.op}{f' ({finding.variant})' if finding.variant else ''}"
    checked = f"FAILED: {finding.failure}" if finding.failure else f"error {finding.error:.1e} <= {finding.limit:.1e}"
    parts = [f"{name:32} {finding.implementation:7}", checked]
    if finding.forward_us is not None:
        backward = "" if finding.backward_us is None else f", backward {finding.backward_us:.0f} us"
        parts.append(f"forward {finding.forward_us:.0f} us ({finding.gb_per_s:.0f} GB/s){backward}")
    return "  ".join([*parts, finding.reason]).rstrip()
