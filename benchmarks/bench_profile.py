"""Where the time of a CPU step goes, by kind of op, under torch's profiler.

The profiler itself costs time: compare shares, not seconds. An op of ours counts as what it is, with the matrix
products inside it as matrix products.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness, options  # noqa: E402
from benchmarks.providers import Case  # noqa: E402
from benchmarks.seat import PROFILED_STEPS as STEPS  # noqa: E402
from benchmarks.seat import call_apart  # noqa: E402

PROVIDERS = ("fastmim", "timm", "microsoft-simmim", "microsoft-swin")
# The first that fits the op's name.
KINDS = (
    ("matrix products", r"\b(mm|addmm|bmm|baddbmm|linear|matmul|_linear_pointwise|\w*convolution\w*)$"),
    ("attention", r"attention|softmax|normalize|linalg_vector_norm"),
    ("norms", r"layer_norm|residual_norm|patch_merge"),
    ("GELU", r"gelu"),
    ("target", r"pool|local_norm"),
    ("optimiser", r"adam|_foreach|lerp|addcmul|addcdiv|sqrt|Optimizer"),
    ("copies", r"copy|clone|contiguous|\bcat$|roll|fill_|zero_|index|gather|scatter|embedding"),
    ("elementwise, sums", r"\b(mul|add|div|sub|rsub|neg|exp|log\d*|pow|abs|sgn|sum|mean|where|clamp\w*|sigmoid\w*)_?$"),
)
OTHER = "everything else"


def kind_of(op: str) -> str:
    """The kind that an op's name belongs to."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, op)), OTHER)


def by_kind(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each kind, the longest first, of (op, seconds by itself)."""
    spent: dict[str, float] = {}
    for op, seconds in events:
        spent[kind_of(op)] = spent.get(kind_of(op), 0.0) + seconds
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def measure_case(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CSV rows of one case, one per provider and kind; each provider runs in a process of its own."""
    shared = {"benchmark": "profile", "rounds": STEPS, **options.describe(case, 1, args)}
    rows = []
    for name in args.providers:
        events = call_apart("profile", name, case, args)
        if isinstance(events, str):
            print(f"  not measured: {events}", file=sys.stderr)
            continue
        spent = by_kind(events)
        total = sum(spent.values())
        print(f"{case.name} {case.dtype} {name}: {total:.3f} s a step under the profiler")
        for kind, seconds in spent.items():
            print(f"  {kind:16} {seconds:7.3f} s {100 * seconds / total:5.1f} %")
            rows.append(shared | {"provider": name, "note": kind, "seconds": f"{seconds:.4f}"})
        for op, seconds in sorted(events, key=lambda event: -event[1])[: args.top]:
            print(f"    {seconds:7.3f} s  {kind_of(op):16} {op}")
        sys.stdout.flush()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py profile", __doc__)
    options.add_shared(parser)
    parser.set_defaults(providers=list(PROVIDERS))
    parser.add_argument("--top", type=command.natural, default=0, help="so many of the longest single ops as well")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    for case in options.cases(args):
        harness.append_rows(args.out, measure_case(case, args))
        gc.collect()
    return 0


if __name__ == "__main__":
    command.exit_with("run.py profile", main)
