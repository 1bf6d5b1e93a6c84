"""Every op by itself at the first stage of an encoder, beside what a copy and a product reach in the same run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_kernels, kernel_works
from benchmarks.proof.part import Outcome, Setting
from fastmim.models.sizes import SIZES

DTYPE = torch.bfloat16
ROUNDS = 3
DRY = ("window_attention", "mlp", "patch_merge")


def kernels(setting: Setting, outcome: Outcome) -> None:
    """Times from CUDA graphs, as shares of measured bandwidth and of the measured rate of products."""
    device = setting.torch_device
    if setting.dry:
        outcome.leave_out("times from CUDA graphs, Triton's kernels and batch 128: torch's ops on one map are timed, "
                          "and no time is kept")  # fmt: skip
    sizes = ("swin_tiny",) if setting.dry else ("swinv2_base", "swin_base")
    batch, impl = (1, "torch") if setting.dry else (128, "triton")
    copy = bench_kernels.copy_bandwidth(device, ROUNDS)
    product = bench_kernels.matmul_rate(device, ROUNDS, DTYPE)
    if not setting.dry:
        outcome.note("copy of 1 GiB, read and written, GB/s", copy)
        outcome.note("product of 8192 x 8192 in bf16, TFLOP/s", product)
    for size in sizes:
        shape = kernel_works.stage(SIZES[size], 2) if setting.dry else SIZES[size]
        for op in DRY if setting.dry else kernel_works.WORKS:
            rows = measured(op, shape, impl, batch, device, copy, product)
            named = [{"benchmark": "kernels", **row, "case": f"{row['case']} {size}"} for row in rows]
            if setting.dry:
                outcome.check(f"{op}: directions that were timed", len(named), "2", len(named) == 2)
                continue
            outcome.rows += named
            for row in named:
                outcome.note(row["case"], f"{row['seconds']} s, {row['note']}")


def measured(op: str, shape: dict[str, Any], impl: str, batch: int, device: torch.device, copy: float, product: float
             ) -> list[dict[str, Any]]:
    """A row of each direction of an op, without the columns of the run."""
    work = kernel_works.WORKS[op](shape, batch, DTYPE.itemsize)
    low = dict.fromkeys(work.low, DTYPE)
    function = bench_kernels.provider(op, impl)
    flops = {name: counted(step) for name, step in bench_kernels.calls_of(function, work, low, device).items()}
    times = bench_kernels.times(bench_kernels.calls_of(function, work, low, device), device, ROUNDS)
    moved = {"forward": work.bytes_forward, "backward": work.bytes_backward}
    moved["step"] = sum(filter(None, moved.values()))
    rows = []
    for direction, (middle, low, high) in times.items():
        of_copy = (moved[direction] or 0) / middle / 1e9 / copy
        of_product = flops[direction] / middle / 1e12 / product
        rows.append({
            "case": f"{op} {direction}", "dtype": "bf16", "batch": batch, "provider": impl, "rounds": ROUNDS,
            "seconds": f"{middle:.3e}", "seconds_p20": f"{low:.3e}", "seconds_p80": f"{high:.3e}",
            "mb_per_image": f"{(moved[direction] or 0) / batch / 1e6:.4g}", "roofline_share": f"{of_copy:.3f}",
            "gflop_per_image": f"{flops[direction] / batch / 1e9:.4g}", "matmul_share": f"{of_product:.3f}",
            "note": f"{of_copy:.0%} of a copy's {copy:.0f} GB/s, {of_product:.0%} of a product's {product:.0f} TFLOP/s",
        })  # fmt: skip
    return rows


def counted(step: Any) -> int:
    """FLOPs of the matrix products of a call, by the ops' own formulas; the first call may be a forward pass too."""
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
