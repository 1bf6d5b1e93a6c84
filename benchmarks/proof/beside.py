"""Our window attention beside other people's: the same result first, then time and memory of both."""

from __future__ import annotations

import argparse

import torch

from benchmarks import bench_rivals, kernel_works, rivals
from benchmarks.proof.part import Outcome, Setting
from fastmim.models.sizes import SIZES

ROUNDS, BATCH = 3, 128


def beside(setting: Setting, outcome: Outcome) -> None:
    """SDPA, FlexAttention, and what else is there; a rival that raises or computes something else is not timed."""
    if setting.dry:
        _dry(setting, outcome)
        return
    args = argparse.Namespace(sizes=["swinv2_base", "swin_base"], rivals=rivals.NAMES, reference=setting.reference,
                              dtype="bf16", batch=BATCH, rounds=ROUNDS)  # fmt: skip
    outcome.note("claim", rivals.CLAIM)
    for row in bench_rivals.rows(args, setting.torch_device, "triton", outcome.leave_out):
        if "seconds" not in row:
            outcome.leave_out(f"{row['case']} {row['provider']}: {row['note']}")
            continue
        outcome.rows.append(row)
        outcome.note(f"{row['case']}: {row['provider']}", f"{row['seconds']} s, {row['ratio']} times as fast as ours, "
                     f"peak {row['peak_memory_gib']} GiB")  # fmt: skip


def _dry(setting: Setting, outcome: Outcome) -> None:
    outcome.leave_out("times, memory and every gradient of Flex: one map on the CPU in fp32, equality only")
    shape = kernel_works.stage(SIZES["swinv2_tiny"], 1)
    for name in rivals.NAMES:
        try:
            rival = rivals.find(name, None, setting.torch_device, cosine=True)
        except rivals.Absent as reason:
            outcome.leave_out(str(reason))
            continue
        work = kernel_works.WORKS[bench_rivals.OP](shape, 1, 4)
        apart, limit = bench_rivals.difference(rival, work, "torch", torch.float32, setting.torch_device)
        outcome.at_most(f"{name}, from ours", apart, limit)
