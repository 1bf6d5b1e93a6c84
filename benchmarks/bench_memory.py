"""Peak memory of a training step: every provider in a process of its own, so that no other one is in its peak.

On a CPU the peak counts resident pages (weights, gradients, moments, activations, libraries), on a GPU it is the
CUDA allocator's, with NVML's reading beside it. Saved bytes are what autograd keeps between forward and backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import bench_compare, command, harness, options  # noqa: E402
from benchmarks.providers import Case  # noqa: E402
from benchmarks.seat import call_apart  # noqa: E402

PROVIDERS = (*options.PROVIDERS, "fastmim-recompute-fc1_qkv", "fastmim-recompute-full")

Found = tuple[dict[str, str], tuple[float, float]]


def measure_apart(name: str, case: Case, args: argparse.Namespace) -> Found | str:
    """CSV columns and losses of one provider, measured in a new process, or why there are none."""
    return call_apart("memory", name, case, args)


def measure_case(case: Case, args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """CSV rows of one case, and how many providers were refused because their losses are not the judge's."""
    found: dict[str, Found] = {}
    for name in args.providers:
        columns = measure_apart(name, case, args)
        if isinstance(columns, str):
            print(f"  not measured: {columns}", file=sys.stderr)
        else:
            found[name] = columns
    losses = {name: own for name, (_, own) in found.items()}
    refused = bench_compare.refused(losses, case, next(iter(losses), ""))
    shared = {"benchmark": "memory", **options.describe(case, 1, args)}
    kept = {name: columns for name, (columns, _) in found.items() if name not in refused}
    return [shared | columns | {"provider": name} for name, columns in kept.items()], len(refused)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py memory", __doc__)
    options.add_shared(parser)
    parser.set_defaults(providers=list(PROVIDERS))
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)  # what the rows say
    refused = 0
    for case in options.cases(args):
        rows, count = measure_case(case, args)
        refused += count
        harness.append_rows(args.out, rows)
        for row in rows:
            print(
                f"{row['case']:15} {row['dtype']} b{row['batch']} {row['provider']:22}"
                f" peak {row['peak_memory_gib']} GiB ({row['memory_kind']}; {row['start_memory_gib']} before a step)"
                f"  saved {row.get('saved_mb_per_image', '-')} MB/image",
                flush=True,
            )
    return int(refused > 0)


if __name__ == "__main__":
    command.exit_with("run.py memory", main)
