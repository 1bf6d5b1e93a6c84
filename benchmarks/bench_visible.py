"""SimMIM on visible tokens only beside SimMIM with the same encoder: counted on fake tensors and measured on this CPU.

    python benchmarks/bench_visible.py [--cases swin_base swinv2_base] [--ratios 0.6 0.75] [--only counted] [--record]

Counted, as by op_count.py: FLOPs, traffic and launches of a step of a GPU, and what autograd keeps, at batch 128 under
bf16 autocast. Measured: forward and backward in CPU seconds of this process, in turns; the peak of torch's allocator
above weights and gradients, and what autograd keeps. The published gain (Huang et al. 2022) is 2.7x in time and 70 % of
the memory, of a GPU at 75 % hidden.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness, step_count  # noqa: E402
from fastmim import create_objective  # noqa: E402
from fastmim.plan.saved import SavedTensors  # noqa: E402

WAYS = {"simmim": False, "visible": True}
COLUMNS = (
    "kind", "case", "dtype", "batch", "mask_ratio", "way", "launches", "gflop", "mb", "saved_mb", "modelled_us_h100",
    "seconds", "speedup", "speedup_p20", "speedup_p80", "peak_mb", "machine", "torch", "commit", "date",
)  # fmt: skip
FROM_MACHINE = ("machine", "torch", "commit", "date")


def build(case: str, ratio: float, way: str) -> Any:
    torch.manual_seed(0)
    return create_objective("simmim", encoder={"name": case}, mask_ratio=ratio, visible_only=WAYS[way])


def counted(case: str, ratio: float, batch: int) -> list[dict[str, Any]]:
    """A row of each way; numbers are of one image, launches of the batch."""
    rows = []
    for way in WAYS:
        # The weights' copies, of which a step makes one set, are not in the counts.
        found = step_count.count_step(lambda way=way: build(case, ratio, way), batch=batch, casts_once=True)
        launches, moved, flops = found.counter.totals()
        rows.append({
            "kind": "counted", "dtype": "bf16", "way": way, "launches": launches, "gflop": flops / batch / 1e9,
            "mb": moved / batch / 1e6, "saved_mb": found.saved_megabytes, "modelled_us_h100": found.honest(),
        })  # fmt: skip
    return rows


def measured(case: str, ratio: float, batch: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A row of each way; megabytes are of the whole batch."""
    steps: dict[str, Callable[[], None]] = {}
    rows = []
    for way in WAYS:
        objective = build(case, ratio, way)
        given = objective.example(batch)
        steps[way] = lambda objective=objective, given=given: step(objective, given, dtype)
        steps[way]()
        saved = SavedTensors([*objective.parameters(), *objective.buffers(), *given])
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            objective(*given)
        rows.append({"kind": "measured", "dtype": dtype, "way": way, "saved_mb": saved.bytes / 1e6,
                     "peak_mb": peak(steps[way]) / 1e6})  # fmt: skip
    timings = harness.interleave(steps, rounds=rounds, clock=lambda _: time.process_time())
    for row in rows:
        gains = harness.speedup(timings["simmim"], timings[row["way"]])
        row["seconds"] = timings[row["way"]].quantiles()[0]
        row |= dict(zip(("speedup", "speedup_p20", "speedup_p80"), gains, strict=True))
    return rows


def step(objective: Any, given: Any, dtype: str) -> None:
    """Forward and backward; gradients are added to those that are there, as in an accumulated step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = objective(*given)["loss"]
    loss.backward()


def peak(run: Callable[[], None]) -> int:
    """Most bytes that torch's CPU allocator has given out during ``run()`` beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def told(row: dict[str, Any]) -> str:
    words = [f"{row['kind']} {row['case']} {row['dtype']} b{row['batch']} {row['mask_ratio']} hidden, {row['way']:8}"]
    words += [f"{key} {row[key]:.4g}" for key in COLUMNS[6:16] if key in row]
    return "  ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("bench_visible.py", __doc__)
    parser.add_argument("--cases", nargs="+", default=["swin_base", "swinv2_base"], metavar="NAME", help="encoders")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.6, 0.75], help="shares of hidden units")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="measured in")
    parser.add_argument("--batch", type=command.positive, default=8, help="images of a measured step")
    parser.add_argument("--rounds", type=command.positive, default=5, help="measured steps of each way")
    parser.add_argument("--only", choices=("counted", "measured"), help="one of the two (default: both)")
    parser.add_results("visible.csv", "CSV, written anew")
    args = parser.parse_args(argv)
    rows = [row for case in args.cases for ratio in args.ratios for row in rows_of(case, ratio, args)]
    command.write_csv(args.out, COLUMNS, rows)
    return 0


def rows_of(case: str, ratio: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    machine = {key: value for key, value in harness.environment().items() if key in FROM_MACHINE}
    if args.only != "measured":
        rows += [{"batch": 128, **row} for row in counted(case, ratio, 128)]
    for dtype in args.dtypes if args.only != "counted" else ():
        rows += [{"batch": args.batch, **row} for row in measured(case, ratio, args.batch, dtype, args.rounds)]
    rows = [{"case": case, "mask_ratio": ratio, **row, **machine} for row in rows]
    for row in rows:
        print(told(row), flush=True)
    return [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


if __name__ == "__main__":
    command.exit_with("bench_visible.py", main)
