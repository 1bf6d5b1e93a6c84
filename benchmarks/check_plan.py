"""The planner's peak beside torch's MemTracker, which follows every storage of real training steps on fake tensors.

Two optimiser steps of LocalEngine with two micro-batches each: the second finds the optimiser's states, and its last
backward all gradients. MemTracker sees what ops return, not what a custom op holds inside; the planner counts that
too, and 0.25 GB for libraries, which is left out here. No GPU, no arithmetic: SwinV2-G takes a few minutes.

    python benchmarks/check_plan.py [--models swinv2_giant …] [--policies full …] [--batch 64]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks.op_count import versions, write  # noqa: E402
from fastmim import create_objective  # noqa: E402
from fastmim.engine.local import LocalEngine  # noqa: E402
from fastmim.engine.optim import build_optimizer, param_groups  # noqa: E402
from fastmim.engine.recompute import POLICIES, apply_recompute  # noqa: E402
from fastmim.plan.cuda_autocast import cuda_autocast  # noqa: E402
from fastmim.plan.memory import LIBRARIES, memory  # noqa: E402
from fastmim.plan.trace import Footprint, fake_values, trace  # noqa: E402
from fastmim_kernels.common.dispatch import as_on_a_gpu  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "check_plan.csv"
ACCUM = 2
TOLERANCE = 0.10


def builder(encoder: dict[str, Any], policy: str) -> Callable[[], Any]:
    """The objective of the SwinV2 recipes under a recomputation policy."""

    def build() -> Any:
        objective = create_objective("simmim", encoder=encoder, norm_target=47)
        apply_recompute(objective, policy)
        return objective

    return build


def tracked_peak(build: Callable[[], Any], batch: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Most bytes that MemTracker saw alive in two optimiser steps of LocalEngine."""
    with FakeTensorMode(), as_on_a_gpu(), fake_values():
        objective = build().train()
        optimizer = build_optimizer("adamw", param_groups(objective, 0.05), 1e-4)
        engine = LocalEngine(
            objective, optimizer, grad_accum_steps=ACCUM, clip_grad=5.0, precision="bf16", check_every_step=False
        )
        tracker = MemTracker()
        tracker.track_external(objective, optimizer)
        with tracker, cuda_autocast(dtype):
            for micro in range(2 * ACCUM):
                objective.set_micro_batch(micro % ACCUM, ACCUM)
                images = torch.empty(batch, objective.in_chans, *objective.img_size, dtype=torch.uint8)
                mask = torch.empty(batch, *objective.encoder.grid, dtype=torch.bool)
                loss = engine(images, mask)["loss"]
                engine.backward(loss)
                engine.step()
                tracker.reset_mod_stats()
        return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def planned_peak(build: Callable[[], Any], batch: int) -> float:
    """The planner's total without the libraries' constant."""
    plan = memory(Footprint(*trace(build)), stage=0, gpus=1, micro_batch=batch, grad_accum_steps=ACCUM)
    return plan.total - LIBRARIES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=["swinv2_base", "swinv2_giant"])
    parser.add_argument("--policies", nargs="+", default=["full"], choices=POLICIES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows = []
    for name in args.models:
        for policy in args.policies:
            build = builder({"name": name, "drop_path_rate": 0.1}, policy)
            planned, tracked = planned_peak(build, args.batch), tracked_peak(build, args.batch)
            off = planned / tracked - 1
            rows.append(
                {
                    **versions(),
                    "model": name,
                    "recompute": policy,
                    "batch": args.batch,
                    "planned_gb": round(planned / 1e9, 3),
                    "tracked_gb": round(tracked / 1e9, 3),
                    "planned_over_tracked": round(1 + off, 4),
                }
            )
            print(f"{name}, recompute {policy}, batch {args.batch}: planned {planned / 1e9:.2f} GB, "
                  f"MemTracker {tracked / 1e9:.2f} GB, {off:+.1%}", flush=True)  # fmt: skip
    write(rows, args.out)
    return int(any(abs(row["planned_over_tracked"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
