"""A whole SimMIM training step of ours beside the same step on timm's encoders, interleaved.

    python benchmarks/bench_step.py [--cases swinv2_base+47 swinv2_base swin_base] [--dtypes fp32 bf16]
                                    [--batch 4] [--rounds 7] [--compile timm fastmim] [--impl torch] [--clock wall]
                                    [--out CSV]

A step is forward, backward, clipping at 5.0 and AdamW; both sides start from the same weights, see the same
images and masks, and must give the same loss, or nothing is reported. Ours is what ``train()`` runs: its engine,
its optimiser, and the memory setting that it makes for a CPU. timm's is written plainly, with AdamW as PyTorch
builds it by default. Each provider has a process of its own, idle while the others are timed.
``name+47`` is the normalised target of 47 pixels. ``--clock cpu`` counts the CPU seconds of the provider's
process, for a machine that other work shares: with ``OMP_NUM_THREADS=1``, since waiting threads spin.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from baseline import MODELS, copy_weights, timm_simmim
from processes import Remote
from torch import Tensor, nn

from fastmim.engine.host_memory import keep_freed_memory
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.objectives import create_objective

CASES = ("swinv2_base+47", "swinv2_base", "swin_base")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}  # of the first loss, relative
CLIP, LR, WEIGHT_DECAY = 5.0, 1e-5, 0.05


class Provider:
    """One side: ``timm`` or ``fastmim``, eager or compiled.

    Args:
        side: "timm" or "fastmim".
        case, dtype, batch: As on the command line.
        impl: Of our ops.
        compiled: Run the forward through ``torch.compile``.
    """

    def __init__(self, side: str, case: str, dtype: str, batch: int, impl: str, compiled: bool) -> None:
        name, _, window = case.partition("+")
        torch.manual_seed(0)
        theirs = timm_simmim(name, int(window or 0))
        ours = create_objective("simmim", encoder=MODELS[name][2], norm_target=int(window or 0), impl=impl)
        copy_weights(theirs, ours)
        self.images = torch.randn(batch, 3, *ours.img_size)
        self.mask = ours.random_mask(torch.arange(batch))
        self.objective: nn.Module = ours if side == "fastmim" else theirs
        self.bf16 = dtype == "bf16"
        make = our_step if side == "fastmim" else plain_step
        self._step = make(self.objective, self.images, self.mask, bf16=self.bf16, compiled=compiled)

    def step(self) -> float:
        """One training step; the loss before its update."""
        return self._step()

    def saved_bytes(self) -> int:
        """Kept between forward and backward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            saved = harness.saved_bytes(self.objective, self.images, self.mask)
        self.objective.zero_grad(set_to_none=True)
        return saved

    def cpu_seconds(self) -> float:
        """User and system time of this process so far."""
        return time.process_time()

    def peak_rss(self) -> float:
        """Peak resident memory of this process in GiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plain_step(
    objective: nn.Module, images: Tensor, mask: Tensor, *, bf16: bool, compiled: bool
) -> Callable[[], float]:
    """The step as one would write it."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
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


def our_step(objective: nn.Module, images: Tensor, mask: Tensor, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    """The step of ``train()``."""
    keep_freed_memory()
    optimizer = build_optimizer("adamw", param_groups(objective, WEIGHT_DECAY), LR)
    precision = "bf16" if bf16 else "fp32"
    engine = LocalEngine(objective, optimizer, clip_grad=CLIP, precision=precision, compile=compiled)

    def step() -> float:
        loss = engine(images, mask)["loss"]
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def measure(case: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CSV rows of one model and precision."""
    chosen = {"timm": ("timm", False), f"fastmim-{args.impl}": ("fastmim", False)}
    if "timm" in args.compile:
        chosen["timm-compiled"] = "timm", True
    if "fastmim" in args.compile:
        chosen[f"fastmim-{args.impl}-compiled"] = "fastmim", True
    remotes = {
        key: Remote(Provider, side, case, dtype, args.batch, args.impl, compiled)
        for key, (side, compiled) in chosen.items()
    }
    saved = {key: remote.call("saved_bytes") for key, remote in remotes.items() if not chosen[key][1]}
    losses = {key: remote.call("step") for key, remote in remotes.items()}
    harness.check_losses(losses, TOLERANCE[dtype])
    steps: dict[str, Callable[[], Any]] = {key: lambda r=remote: r.call("step") for key, remote in remotes.items()}
    clock = {"clock": lambda key: remotes[key].call("cpu_seconds")} if args.clock == "cpu" else {}
    timings = harness.interleave(steps, rounds=args.rounds, **clock)
    benchmark = "step" if args.clock == "wall" else "step (CPU seconds)"
    shared = {"benchmark": benchmark, "case": case, "dtype": dtype, "batch": args.batch, "rounds": args.rounds,
              "baseline": "timm", **harness.environment()}  # fmt: skip
    peaks = {key: {"peak_rss_gib": f"{remote.call('peak_rss'):.2f}"} for key, remote in remotes.items()}
    for remote in remotes.values():
        remote.close()
    return [shared | peaks[key] | row(key, timings, losses[key], saved, args.batch) for key in steps]


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
    parser.add_argument("--compile", nargs="*", default=[], choices=("timm", "fastmim"), help="also time torch.compile")
    parser.add_argument("--impl", default="torch", choices=("torch", "reference"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
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


if __name__ == "__main__":
    main()
