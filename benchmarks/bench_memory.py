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

from benchmarks import bench_compare, harness, measure, providers  # noqa: E402
from benchmarks.processes import Remote  # noqa: E402
from benchmarks.providers import Case  # noqa: E402
from benchmarks.seat import Seat, reason_of  # noqa: E402


def measure_apart(name: str, case: Case, args: argparse.Namespace) -> dict[str, str] | str:
    """CSV columns of one provider, measured in a new process, or why there are none."""
    seat = Remote(Seat, name, case, args.reference, args.threads)
    try:
        return seat.call("memory")
    except RuntimeError as error:
        return reason_of(error)
    finally:
        seat.close()


def measure_case(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CSV rows of one case; a provider whose first loss is not the first one's is left out."""
    shared = {"benchmark": "memory", **bench_compare.describe(case, 1, args)}
    rows: list[dict[str, Any]] = []
    for name in args.providers:
        providers.check_name(name)
        columns = measure_apart(name, case, args)
        if isinstance(columns, str):
            print(f"  not measured: {columns}", file=sys.stderr)
            continue
        rows.append(shared | columns | {"provider": name})
        right, tolerance = float(rows[0]["loss"]), measure.TOLERANCE[case.dtype][0]
        if not abs(float(columns["loss"]) - right) <= tolerance * right:
            print(f"  REFUSED {name}: loss {columns['loss']} is not {right}; not reported", file=sys.stderr)
            rows.pop()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py memory", description=__doc__)
    bench_compare.add_shared(parser)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)  # what the rows say
    for case in bench_compare.cases(args):
        rows = measure_case(case, args)
        harness.append_rows(args.out, rows)
        for row in rows:
            print(
                f"{row['case']:15} {row['dtype']} b{row['batch']} {row['provider']:22}"
                f" peak {row['peak_memory_gib']} GiB ({row['memory_kind']}; {row['start_memory_gib']} before a step)"
                f"  saved {row.get('saved_mb_per_image', '-')} MB/image",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
