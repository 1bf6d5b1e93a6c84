"""A whole SimMIM training step of ours beside the same step on timm's encoders, interleaved in one process.

    python benchmarks/bench_step.py [--cases swinv2_base+47 swinv2_base swin_base] [--dtypes fp32 bf16]
                                    [--batch 4] [--rounds 7] [--compile] [--impl torch] [--out CSV]

A step is forward, backward, clipping at 5.0 and AdamW; both sides start from the same weights, see the same
images and masks, and must give the same loss, or nothing is reported. timm's side uses AdamW as PyTorch builds
it by default, ours the fused one that fastmim takes by default. ``name+47`` is the normalised target of 47 pixels.
"""

from __future__ import annotations

import argparse
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from baseline import MODELS, copy_weights, timm_simmim
from torch import Tensor, nn

from fastmim.objectives import create_objective

CASES = ("swinv2_base+47", "swinv2_base", "swin_base")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}  # of the first loss, relative
CLIP = 5.0


def make_step(
    objective: nn.Module, images: Tensor, mask: Tensor, *, bf16: bool, fused: bool, compiled: bool = False
) -> Callable[[], float]:
    """One training step as a function that returns the loss before the update."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-5, weight_decay=0.05, fused=fused or None)
    forward = torch.compile(objective, dynamic=False) if compiled else objective

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(images, mask)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(case: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CSV rows of one model and precision."""
    name, _, window = case.partition("+")
    torch.manual_seed(0)
    theirs = timm_simmim(name, int(window or 0))
    ours = create_objective("simmim", encoder=MODELS[name][2], norm_target=int(window or 0), impl=args.impl)
    copy_weights(theirs, ours)
    images = torch.randn(args.batch, 3, *ours.img_size)
    mask = ours.random_mask(torch.arange(args.batch))
    bf16 = dtype == "bf16"
    objectives = {"timm": theirs, f"fastmim-{args.impl}": ours}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        saved = {key: harness.saved_bytes(value, images, mask) for key, value in objectives.items()}
    for objective in objectives.values():
        objective.zero_grad(set_to_none=True)
    steps = {key: make_step(value, images, mask, bf16=bf16, fused=value is ours) for key, value in objectives.items()}
    if args.compile:
        copy = timm_simmim(name, int(window or 0))
        copy.load_state_dict(theirs.state_dict())
        steps["timm-compiled"] = make_step(copy, images, mask, bf16=bf16, fused=False, compiled=True)
    losses = {key: step() for key, step in steps.items()}
    harness.check_losses(losses, TOLERANCE[dtype])
    timings = harness.interleave(steps, rounds=args.rounds)
    shared = {"benchmark": "step", "case": case, "dtype": dtype, "batch": args.batch, "rounds": args.rounds,
              "baseline": "timm", **harness.environment()}  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shared["peak_rss_gib"] = f"{peak:.2f}"
    return [shared | row(key, timings, losses[key], saved, args.batch) for key in steps]


def row(key: str, timings: dict[str, harness.Timing], loss: float, saved: dict[str, int], batch: int) -> dict[str, Any]:
    """The measured columns of one provider."""
    seconds = timings[key].quantiles()
    ratio = harness.speedup(timings["timm"], timings[key])
    out = dict(zip(("seconds", "seconds_p20", "seconds_p80"), (f"{s:.4f}" for s in seconds), strict=True))
    out |= dict(zip(("ratio", "ratio_p20", "ratio_p80"), (f"{r:.3f}" for r in ratio), strict=True))
    kept = f"{saved[key] / batch / 1e6:.1f}" if key in saved else ""
    return out | {"provider": key, "loss": f"{loss:.6f}", "saved_mb_per_image": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(TOLERANCE))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of timm's step")
    parser.add_argument("--impl", default="torch", choices=("torch", "reference"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "step_cpu.csv")
    args = parser.parse_args()
    for case in args.cases:
        for dtype in args.dtypes:
            rows = measure(case, dtype, args)
            harness.append_rows(args.out, rows)
            for r in rows:
                print(
                    f"{case:16} {dtype} {r['provider']:15} {r['seconds']} s [{r['seconds_p20']}, {r['seconds_p80']}]"
                    f"  {r['ratio']}x [{r['ratio_p20']}, {r['ratio_p80']}]  saved {r['saved_mb_per_image']} MB/image",
                    flush=True,
                )
            gc.collect()


if __name__ == "__main__":
    main()
