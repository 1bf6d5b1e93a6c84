"""The normalised target of SimMIM beside the three sliding average pools that it is published as.

    python benchmarks/bench_target.py [--size 192] [--window 47] [--batch 4] [--rounds 5] [--out CSV]

CPU seconds of this process, interleaved; nothing is reported where the targets differ by more than 1e-5.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness  # noqa: E402
from benchmarks.baseline import average_pool_target  # noqa: E402
from fastmim_kernels import local_norm_target  # noqa: E402

TOLERANCE = 1e-5
REPEATS = 20  # of ours within a measurement: one call is a few milliseconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py target", __doc__)
    for name, default, text in (("size", 192, "edge of an image, pixels"), ("window", 47, "edge of a window, pixels"),
                                ("batch", 4, "images"), ("rounds", 5, "timed rounds")):  # fmt: skip
        parser.add_argument(f"--{name}", type=command.positive, default=default, help=text)
    parser.add_results("measurements.csv")
    args = parser.parse_args(argv)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    truth = average_pool_target(images.double(), args.window)
    # Both beside float64: the pools themselves are rounded in float32.
    worst = (local_norm_target(images, args.window, impl="torch") - truth).abs().max().item()
    if worst > TOLERANCE:
        raise RuntimeError(f"the targets differ by {worst:.1e}, more than {TOLERANCE:g}; no ratio is reported")
    steps = {
        "average-pools": lambda: average_pool_target(images, args.window),
        "fastmim-torch": lambda: [local_norm_target(images, args.window, impl="torch") for _ in range(REPEATS)],
    }
    timings = harness.interleave(steps, rounds=args.rounds, clock=lambda _: time.process_time())
    timings["fastmim-torch"] = harness.Timing(tuple(s / REPEATS for s in timings["fastmim-torch"].seconds))
    rows = []
    for provider, timing in timings.items():
        numbers = [*timing.quantiles(), *harness.speedup(timings["average-pools"], timing)]
        keys = ("seconds", "seconds_p20", "seconds_p80", "ratio", "ratio_p20", "ratio_p80")
        row = {key: f"{value:.4g}" for key, value in zip(keys, numbers, strict=True)}
        rows.append({"benchmark": "target", "note": "CPU seconds", "device": "cpu",
                     "case": f"{args.size}px window {args.window}", "dtype": "fp32", "batch": args.batch,
                     "provider": provider, "baseline": "average-pools",
                     "rounds": args.rounds, **row, **harness.environment()})  # fmt: skip
        print(f"{provider:14} {row['seconds']} s  {row['ratio']}x [{row['ratio_p20']}, {row['ratio_p80']}]")
    print(f"largest difference from float64 {worst:.1e}")
    harness.append_rows(args.out, rows)
    return 0


if __name__ == "__main__":
    command.exit_with("run.py target", main)
