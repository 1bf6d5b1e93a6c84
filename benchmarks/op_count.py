"""Launches, traffic, saved bytes and a *modelled* roofline of a SimMIM step: ours beside an eager timm baseline.

The pure roofline knows bytes and FLOPs, each at 100 %; beside it stands the time at the efficiency that public kernels
reach, with the issue slots of the Triton kernels' machine code as a third roof (``op_count_roofs.csv``: each kernel).

Both steps (forward and backward, 192 px, CUDA's bf16 autocast policy) run on fake tensors, so this needs no GPU
and measures no time. The normalised target is left out of the step and counted by itself. Weights are cast to bf16
once in an optimiser step: ours is counted in its second micro-batch, and the casts are shown and written apart.

    python benchmarks/op_count.py [--models swinv2_base …] [--batch 128] [--detail] [--impl auto]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import fastmim_kernels as fk  # noqa: E402
from benchmarks import command  # noqa: E402
from benchmarks.baseline import average_pool_target  # noqa: E402
from benchmarks.step_count import (  # noqa: E402
    GPUS,
    Count,
    baseline,
    count_step,
    count_target,
    detail,
    ours,
    roof_rows,
    row,
    write,
)
from fastmim_kernels.common.roofs import HONEST  # noqa: E402

MODELS = ("swin_base", "swinv2_base", "swinv2_large", "swinv2_huge", "swinv2_giant")


@dataclasses.dataclass(frozen=True)
class Target:
    """Limits for ours: shares of the eager count, launches, microseconds an image and speed-up on an H100."""

    traffic: float
    launches: int
    saved: float
    microseconds: float
    speedup: float


TARGETS = {
    "swin_base": Target(0.38, 520, 0.60, 170, 2.5),
    "swinv2_base": Target(0.18, 500, 0.33, 165, 5.2),
    "swinv2_large": Target(0.18, 500, 0.33, 300, 4.5),
    "swinv2_huge": Target(0.18, 500, 0.33, 800, 3.4),
    "swinv2_giant": Target(0.18, 1000, 0.33, 3150, 2.6),
}
# Microsoft's own code, counted once in the same way: MB, launches, saved MB and H100 µs an image.
PUBLISHED = {
    "swin_base": (1247, 2178, 103, 439),
    "swinv2_base": (2550, 4121, 182, 873),
    "swinv2_large": (3827, 4121, 272, 1363),
    "swinv2_huge": (7046, 4121, 499, 2768),
    "swinv2_giant": (18258, 8437, 1297, 8260),
}


def verdicts(name: str, ours: Count, eager: Count) -> list[tuple[str, float, float, float, bool]]:
    """(quantity, eager, ours, limit, met) for each target; shares are limits on ours / eager."""
    target = TARGETS[name]
    times = eager.microseconds(), ours.microseconds()
    speedup = times[0] / times[1]
    return [
        (
            "traffic, MB/img",
            eager.megabytes,
            ours.megabytes,
            target.traffic * eager.megabytes,
            ours.megabytes <= target.traffic * eager.megabytes,
        ),
        ("launches", eager.launches, ours.launches, target.launches, ours.launches <= target.launches),
        (
            "saved, MB/img",
            eager.saved_megabytes,
            ours.saved_megabytes,
            target.saved * eager.saved_megabytes,
            ours.saved_megabytes <= target.saved * eager.saved_megabytes,
        ),
        ("modelled H100, us/img", *times, target.microseconds, times[1] <= target.microseconds),
        ("modelled speed-up", 1.0, speedup, target.speedup, speedup >= target.speedup),
    ]


def show(name: str, ours: Count, eager: Count) -> None:
    """Our counts beside the baseline's, the published ones' and the target; then what the pure roof leaves out."""
    published = dict(
        zip(("traffic, MB/img", "launches", "saved, MB/img", "modelled H100, us/img"), PUBLISHED[name], strict=True)
    )
    print(f"{name}, batch {ours.batch}\n  {'':24}{'published':>10}{'eager':>10}{'ours':>10}{'share':>8}{'target':>10}")
    for quantity, theirs, mine, limit, met in verdicts(name, ours, eager):
        known = f"{published[quantity]:10.0f}" if quantity in published else " " * 10
        digits = 2 if quantity == "modelled speed-up" else 0 if quantity == "launches" else 1
        print(
            f"  {quantity:24}{known}{theirs:10.{digits}f}{mine:10.{digits}f}{mine / theirs:8.3f}"
            f"{limit:10.{digits}f}  {'met' if met else 'MISSED'}"
        )
    efficiency = f"{HONEST.memory:.0%} of bandwidth, {HONEST.cublas:.0%} and in Triton {HONEST.triton:.0%} of FLOP/s"
    for side, count in (("eager", eager), ("ours", ours)):
        parts = ", ".join(f"{roof} {us:.1f}" for roof, us in count.bound().items())
        print(f"  {side} at {efficiency}, with issue slots: H100 {count.honest():.1f} us/img (bound by {parts})")
    cast = sum(x.bytes for x in ours.casts) / ours.batch / 1e6
    seconds = sum(x.seconds(GPUS[0]) for x in ours.casts) / ours.batch
    print(
        f"  besides, once an optimiser step: {len(ours.casts)} launch for weight casts, {cast:.1f} MB and "
        f"{seconds * 1e6:.1f} us an image of one micro-batch"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("op_count.py", __doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="sizes")
    parser.add_argument("--batch", type=command.positive, default=128, help="images a step")
    parser.add_argument("--impl", default="auto", choices=fk.IMPLS,
                        help="of our ops; auto: what a CUDA device would get")  # fmt: skip
    parser.add_argument("--detail", action="store_true", help="the costliest ops of ours, and what is saved")
    parser.add_argument("--top", type=command.positive, default=40, help="lines of --detail")
    parser.add_results("op_count.csv", "CSV, written anew, with NAME_roofs.csv beside it")
    args = parser.parse_args(argv)
    rows, roofs, missed = [], [], 0
    for name in args.models:
        eager = count_step(baseline(name), batch=args.batch)
        mine = count_step(ours(name, args.impl), batch=args.batch, sites=args.detail, casts_once=True)
        show(name, mine, eager)
        missed += sum(not met for *_, met in verdicts(name, mine, eager))
        rows += [row(name, "eager", eager), row(name, "ours", mine)]
        roofs += roof_rows(name, mine)
        if args.detail:
            print(detail(mine, args.top))
    for side, function in (("eager", average_pool_target), ("ours", fk.local_norm_target)):
        target = count_target(function, args.batch)
        rows.append(row("normalised_target", side, target))
        print(
            f"normalised target, {side}: {target.launches} launches, {target.megabytes:.2f} MB/img, "
            f"modelled {target.microseconds():.2f} us/img (window sums of the pools as one pass over memory)"
        )
    write(rows, args.out)
    write(roofs, args.out.with_name(f"{args.out.stem}_roofs.csv"))
    return 1 if missed else 0


if __name__ == "__main__":
    command.exit_with("op_count.py", main)
