"""Window attention beside other people's: equal on the same input first, then time and memory in turns.

    python benchmarks/bench_rivals.py [--reference CLONE] [--sizes swinv2_base swin_base] [--dtype bf16] [--batch N]
                                      [--rivals flash-window-attention-v2 sdpa flex natten] [--rounds N] [--out CSV]

Rivals are a clone of github.com/emiledgl/flash-window-attention-v2, torch's SDPA with the bias as its mask,
FlexAttention, and NATTEN where it is installed. ``ratio`` is a rival's speed over ours. A rival whose output or
gradient differs from ours by more than eight times the plain torch version's error and a rounding is not timed, nor is
one that raises, and the exit status is 1. What a rival lacks stands in its row. Memory is the peak of a forward and a
backward pass, on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import bench_kernels, command, harness, rivals  # noqa: E402
from benchmarks.kernel_works import WORKS, Work  # noqa: E402
from benchmarks.measure import GIB  # noqa: E402
from benchmarks.rivals import Absent, Rival  # noqa: E402
from fastmim.models.sizes import SIZES  # noqa: E402

OP = "window_attention"
FACTOR = 8.0
"""Of the error of the plain torch version: rivals round what ours keeps in float32."""


def rounded(work: Work, dtype: torch.dtype) -> Work:
    """``work`` whose values ``dtype`` can hold: what a rival casts is then the same number."""
    own = {k: v.to(dtype).to(v) if isinstance(v, Tensor) and v.is_floating_point() else v
           for k, v in work.arguments.items()}  # fmt: skip
    return Work(own, work.low, work.grads)


def difference(rival: Rival, work: Work, impl: str, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(distance from ours, limit) of the output or gradient that is worst beside its limit."""
    work = rounded(rival.work(work), dtype)
    low = dict.fromkeys(work.low, dtype)
    double = {k: torch.float64 for k, v in work.arguments.items() if isinstance(v, Tensor)}
    truth = bench_kernels.results(bench_kernels.provider(OP, "reference"), work, double, device)
    plain = bench_kernels.results(bench_kernels.provider(OP, "reference"), work, low, device)
    ours = bench_kernels.results(bench_kernels.provider(OP, impl), work, low, device)
    theirs = bench_kernels.results(rival.attention, work, low, device)
    pairs = [(bench_kernels.relative(other, own.double()),
              FACTOR * bench_kernels.relative(p, t) + torch.finfo(dtype).eps + bench_kernels.FLOOR)
             for other, own, p, t in zip(theirs, ours, plain, truth, strict=True)]  # fmt: skip
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def peak_gib(function: Callable[..., Tensor], work: Work, dtypes: dict[str, torch.dtype]) -> float:
    """Peak of the CUDA allocator over a forward and a backward pass, without the arguments."""
    arguments = bench_kernels.prepared(work, dtypes, torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = function(**arguments)
    if work.grads:
        torch.autograd.grad(out, [arguments[n] for n in work.grads], torch.ones_like(out))
    return (torch.cuda.max_memory_allocated() - before) / GIB


def measure(rival: Rival, size: str, impl: str, args: argparse.Namespace, device: torch.device
            ) -> Iterator[dict[str, Any]]:
    """Rows of a rival and of ours on the same work, or one row that says why there are none."""
    shared = {"benchmark": "rivals", "case": f"{OP} {size}", "dtype": args.dtype, "batch": args.batch,
              "device": bench_kernels._device_name(device), "baseline": impl, "rounds": args.rounds,
              "provider": rival.name}  # fmt: skip
    try:
        yield from _measured(rival, size, impl, args, device, shared)
    except Exception as broken:  # other people's kernels fail in many types, and the other rivals go on
        yield shared | {"note": f"NOT TIMED: {type(broken).__name__}: {' '.join(str(broken).split())[:300]}"}


def _measured(rival: Rival, size: str, impl: str, args: argparse.Namespace, device: torch.device,
              shared: dict[str, Any]) -> Iterator[dict[str, Any]]:  # fmt: skip
    dtype = bench_kernels.DTYPES[args.dtype]
    make = WORKS[OP]
    apart, limit = difference(rival, make(SIZES[size], bench_kernels.CHECK_BATCH, dtype.itemsize), impl, dtype, device)
    note = f"{rival.lacks}; {rivals.CLAIM}" if rival.name == rivals.CLONE else rival.lacks
    if not apart <= limit:
        yield shared | {"note": f"NOT TIMED: {apart:.2e} from ours, more than {limit:.2e}; {note}"}
        return
    work = rival.work(make(SIZES[size], args.batch, dtype.itemsize))
    low = dict.fromkeys(work.low, dtype)
    functions = {impl: bench_kernels.provider(OP, impl), rival.name: rival.attention}
    steps = {name: bench_kernels.calls_of(function, work, low, device) for name, function in functions.items()}
    for direction in steps[impl]:
        # Some rivals copy from the host, which no graph can hold: everybody is timed by events.
        mine = {n: s[direction] for n, s in steps.items()}
        seconds = bench_kernels.times(mine, device, args.rounds, graphs=False)
        for name, values in seconds.items():
            row = shared | {"provider": name, "case": f"{OP} {direction} {size}, beside {rival.name}",
                            "ratio": f"{seconds[impl][0] / values[0]:.3f}"}  # fmt: skip
            row |= dict(zip(("seconds", "seconds_p20", "seconds_p80"), (f"{v:.3e}" for v in values), strict=True))
            if device.type == "cuda":
                row |= {"peak_memory_gib": f"{peak_gib(functions[name], work, low):.3f}",
                        "memory_kind": "cuda allocator"}  # fmt: skip
            yield row | {"note": f"{apart:.2e} from ours <= {limit:.2e}; {note}" if name == rival.name else ""}


def rows(args: argparse.Namespace, device: torch.device, impl: str, say: Callable[[str], None] = print
         ) -> Iterator[dict[str, Any]]:
    """Rows of every rival that is there; ``say`` hears why others are not."""
    for size in args.sizes:
        for name in args.rivals:
            try:
                rival = rivals.find(name, args.reference, device, cosine=SIZES[size]["name"] == "swinv2")
            except Absent as reason:
                say(f"{size}: {reason}")
                continue
            yield from measure(rival, size, impl, args, device)


def parser() -> command.Parser:
    """The command's options."""
    on_gpu = torch.cuda.is_available()
    found = command.Parser("run.py rivals", __doc__)
    found.add_argument("--sizes", nargs="+", default=["swinv2_base", "swin_base"],
                       choices=[k for k in SIZES if k.startswith("swin")],
                       help="encoders whose first stage is taken")  # fmt: skip
    found.add_argument("--rivals", nargs="+", default=list(rivals.NAMES), choices=rivals.NAMES, help="whom to ask")
    found.add_argument("--reference", type=Path, metavar="DIR", help=f"clone of {rivals.CLONE}")
    found.add_argument("--dtype", choices=list(bench_kernels.DTYPES), default="bf16" if on_gpu else "fp32",
                       help="precision")  # fmt: skip
    found.add_argument("--batch", type=command.positive, default=128 if on_gpu else 1, help="images")
    found.add_argument("--rounds", type=command.positive, default=7, help="timed rounds on a CPU")
    found.add_results("measurements.csv")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = 0
    print(rivals.CLAIM)
    for row in rows(args, device, "triton" if device.type == "cuda" else "torch"):
        harness.append_rows(args.out, [row | harness.environment()])
        status |= int("seconds" not in row)
        print(f"{row['case']:60} {row['provider']:26} {row.get('seconds', '-')} s, {row.get('ratio', '-')}x ours; "
              f"{row['note']}", flush=True)  # fmt: skip
    return status


if __name__ == "__main__":
    command.exit_with("run.py rivals", main)
