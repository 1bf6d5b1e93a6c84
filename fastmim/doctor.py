"""``fastmim doctor``: what is installed, which implementation each op takes on this machine, and whether it is right.

Every op runs as training would run it (``impl="auto"``), forward and backward, in float32 and bfloat16, and is
compared with its float64 oracle; on a GPU its self-test has passed at the shapes of the encoders too, and it is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform

import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim._version import __version__
from fastmim_kernels.check.examples import SMALL, TIMED, Case
from fastmim_kernels.check.self_test import failure as self_test_failure
from fastmim_kernels.check.self_test import inputs_of, judge, kernel_of, listed, request, run_case
from fastmim_kernels.check.timing import gpu_microseconds
from fastmim_kernels.common.dispatch import no_triton

OPTIONAL = ("triton", "deepspeed", "apex", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_NO_KERNEL = "torch is its only fast implementation"


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
        """There is a Triton kernel, and it will not run, in one dtype at least."""
        return bool(self.reason) and self.reason != _NO_KERNEL


def examine(device: torch.device) -> list[Finding]:
    """Run every case on ``device``."""
    if device.type == "cuda" and not no_triton(device):
        _compile_kernels()
    return [_examine(case, device) for case in SMALL]


def _compile_kernels() -> None:
    """At once: one after the other they take minutes. What does not compile is met again where it is launched."""
    from fastmim_kernels.check.compile_ahead import compile_ahead
    from fastmim_kernels.check.launches import launches_of

    compile_ahead(launches_of(lambda: request((torch.float32, torch.bfloat16))))


def _examine(case: Case, device: torch.device) -> Finding:
    finding = Finding(case.op, case.variant, *_choice(case, device))
    results = [judge(case, device, dtype, "auto") for dtype in _dtypes(case)]
    worst = max(results, key=lambda result: float("inf") if result.raised else result.error / result.limit)
    finding.error, finding.limit = worst.error, worst.limit
    finding.failure = next((result.failure for result in results if result.failure), "")
    if not finding.failure and device.type == "cuda":
        try:
            finding.forward_us, finding.backward_us, finding.gb_per_s = _speed(case, device)
        except Exception as broken:  # the other ops go on
            finding.failure = f"{type(broken).__name__}: {' '.join(str(broken).split())[:300]}"
    return finding


def _dtypes(case: Case) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if case.only is None else (case.only,)


def _choice(case: Case, device: torch.device) -> tuple[str, str]:
    """(implementation that "auto" takes, why it is not Triton)."""
    with contextlib.suppress(Exception):  # "auto" would take Triton and fail in the same way: the check reports it
        try:
            run_case(case, case.build(), {}, device, "triton")
        except ValueError as error:
            reason = no_triton(device)
            return "torch", reason if reason and reason in str(error) else _NO_KERNEL
    failures = {dtype: self_test_failure(kernel_of(case.op), dtype, device) for dtype in _dtypes(case)}
    failed = [failure for failure in failures.values() if failure]
    if not failed:
        return "triton", ""
    name = "torch" if all(failures.values()) else "triton"
    return name, f"its Triton kernel failed the self-test: {'; '.join(failed)}"


def _speed(case: Case, device: torch.device) -> tuple[float, float | None, float]:
    """(forward µs, backward µs or None, GB/s of forward) in bfloat16; bytes are those of inputs and outputs."""
    inputs = inputs_of(TIMED[case.op, case.variant](), {name: torch.bfloat16 for name in case.low}, device)
    op = getattr(fk, case.op)
    with torch.no_grad():
        outputs = listed(op(**inputs))
        forward = gpu_microseconds(lambda: op(**inputs))
    values = [t for value in (*inputs.values(), outputs) for t in (value if isinstance(value, list) else [value])]
    moved = sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))
    if not case.grads:
        return forward, None, moved / forward / 1e3
    wrt = [inputs[name].requires_grad_() for name in case.grads]
    outputs = listed(op(**inputs))
    cotangents = [torch.ones_like(o) for o in outputs]
    backward = gpu_microseconds(lambda: torch.autograd.grad(outputs, wrt, cotangents, retain_graph=True))
    return forward, backward, moved / forward / 1e3


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
    cores = os.cpu_count() or 1
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    lines = [f"cpu: {kind}, {cores} core{'s' * (cores != 1)}"]
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
