"""The planner's peak beside torch's MemTracker, which follows every storage of real training steps on fake tensors.

Two optimiser steps of LocalEngine with two micro-batches each: the second finds the optimiser's states, and its last
backward all gradients. MemTracker sees what ops return, not what a custom op holds inside; the planner counts that
too, and 0.25 GB for libraries, which is left out here. No GPU, no arithmetic: SwinV2-G takes a few minutes.

    python benchmarks/check_plan.py [--models swinv2_giant …] [--policies full …] [--batch 64]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks import command  # noqa: E402
from benchmarks.step_count import versions, write  # noqa: E402
from fastmim.config import Config  # noqa: E402
from fastmim.data import Batch  # noqa: E402
from fastmim.engine.build import make_engine, recomputed_objective  # noqa: E402
from fastmim.engine.cuda_autocast import cuda_autocast  # noqa: E402
from fastmim.engine.distributed import World  # noqa: E402
from fastmim.engine.dry_step import fake_values  # noqa: E402
from fastmim.engine.loop import train_step  # noqa: E402
from fastmim.engine.recompute import POLICIES  # noqa: E402
from fastmim.models.sizes import SIZES  # noqa: E402
from fastmim.plan.memory import LIBRARIES, memory  # noqa: E402
from fastmim.plan.trace import Footprint, trace  # noqa: E402
from fastmim_kernels.common.dispatch import as_on_a_gpu  # noqa: E402

ACCUM, STEPS = 2, 2
TOLERANCE = 0.10


def config(encoder: dict[str, Any], policy: str, batch: int) -> Config:
    """A run of the SwinV2 recipes under a recomputation policy."""
    return Config.model_validate({
        "model": encoder,
        "objective": {"norm_target": 47},
        "train": {"micro_batch_size": batch, "grad_accum_steps": ACCUM, "steps": STEPS, "epochs": None},
        "efficiency": {"precision": "bf16", "recompute": policy},
    })  # fmt: skip


def tracked_peak(cfg: Config, dtype: torch.dtype = torch.bfloat16) -> int:
    """Most bytes that MemTracker saw alive in two optimiser steps of LocalEngine."""
    tracker = MemTracker()
    with FakeTensorMode(), as_on_a_gpu(), fake_values():
        objective = recomputed_objective(cfg).train()
        engine: Any = make_engine(cfg, objective, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
        engine.check_every_step = False  # as on a GPU
        tracker.track_external(objective, engine.optimizer)
        with tracker, cuda_autocast(dtype):
            batches = _batches(objective, cfg.train.micro_batch_size, tracker)
            for _ in range(STEPS):
                train_step(engine, batches, lr=1e-4, seed=0, total=STEPS, steps_per_epoch=STEPS)
        return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def _batches(objective: Any, batch: int, tracker: MemTracker) -> Iterator[tuple[int, Batch]]:
    while True:
        tracker.reset_mod_stats()  # it expects a module to run once
        images = torch.empty(batch, objective.in_chans, *objective.img_size, dtype=torch.uint8)
        yield 0, Batch(images, torch.arange(batch))


def planned_peak(cfg: Config) -> float:
    """The planner's total without the libraries' constant."""
    footprint = Footprint(*trace(lambda: recomputed_objective(cfg)))
    batch, accum = cfg.train.micro_batch_size, cfg.train.grad_accum_steps
    return memory(footprint, stage=0, gpus=1, micro_batch=batch, grad_accum_steps=accum).total - LIBRARIES


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("check_plan.py", __doc__)
    parser.add_argument("--models", nargs="+", default=["swinv2_base", "swinv2_giant"], choices=list(SIZES),
                        metavar="SIZE", help="sizes")  # fmt: skip
    parser.add_argument("--policies", nargs="+", default=["full"], choices=POLICIES, help="of recomputation")
    parser.add_argument("--batch", type=command.positive, default=64, help="micro-batch, images")
    parser.add_results("check_plan.csv", "CSV, written anew")
    args = parser.parse_args(argv)
    rows = []
    for name in args.models:
        for policy in args.policies:
            cfg = config({"name": name, "drop_path_rate": 0.1}, policy, args.batch)
            planned, tracked = planned_peak(cfg), tracked_peak(cfg)
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
    command.exit_with("check_plan.py", main)
