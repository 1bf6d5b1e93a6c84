"""The ops one by one: the doctor, the self-test that training relies on, and float64 as the judge of every op."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import bench_kernels, harness, kernel_works
from benchmarks.proof.part import Outcome, Setting
from fastmim.doctor import doctor
from fastmim.models.sizes import SIZES
from fastmim_kernels.check.self_test import CASES, errors

BATCH, ODD_BATCH = 8, 3
STAGES = {"swinv2_base": (0, 2, 3), "swin_base": (0, 2)}
"""Of the encoders that are measured: first, deepest and last, where tiles and splits differ."""
ODD: dict[str, dict[str, Any]] = {
    "swinv2": dict(name="swinv2", embed_dim=72, num_heads=(3,), depths=(3,), window_size=5, grid=15),
    "swin": dict(name="swin", embed_dim=88, num_heads=(2,), depths=(3,), window_size=7, grid=21),
}
FIRST_STAGE_ONLY = ("mask_tokens", "masked_l1", "linear_masked_l1", "local_norm_target", "position_bias",
                    "distillation", "unshuffle")  # fmt: skip


def self_test(setting: Setting, outcome: Outcome) -> None:
    """What ``fastmim doctor`` says, and every case of the self-test in every precision."""
    report, status = doctor()
    print(report)
    outcome.check("fastmim doctor", f"exit status {status}", "0", status == 0)
    if setting.dry:
        outcome.leave_out("the self-test of Triton's kernels: there is no GPU; the doctor has tested torch's ops")
        return
    for case in CASES:
        for name, dtype in bench_kernels.DTYPES.items():
            shown = f"{case.op}{f' ({case.variant})' if case.variant else ''}, {name}"
            outcome.judge(shown, functools.partial(_of_case, case, setting, dtype))


def _of_case(case: Any, setting: Setting, dtype: torch.dtype) -> tuple[float, float]:
    error, limit = errors(case, setting.torch_device, dtype, "triton")[-2:]
    return error, limit


def ops(setting: Setting, outcome: Outcome) -> None:
    """Forward and every gradient against float64, at shapes that leave remainders everywhere and those of encoders."""
    if setting.dry:
        _dry(setting, outcome)
        return
    for op, where, shape, batch in shapes():
        _against_float64(op, where, shape, batch, "triton", setting, outcome)


def shapes() -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """(op, where, shapes, batch) of all that is compared."""
    for kind, shape in ODD.items():
        for op in kernel_works.WORKS:
            yield op, f"odd shapes of {kind}", shape, ODD_BATCH
    for size, stages in STAGES.items():
        for stage in stages:
            shape = kernel_works.stage(SIZES[size], stage)
            for op in kernel_works.WORKS:
                if stage == 0 or op not in FIRST_STAGE_ONLY:
                    yield op, f"stage {stage} of {size}", shape, BATCH


def _against_float64(op: str, where: str, shape: dict[str, Any], batch: int, impl: str, setting: Setting,
                     outcome: Outcome) -> None:  # fmt: skip
    def found(dtype: torch.dtype) -> tuple[float, float]:
        work = kernel_works.WORKS[op](shape, batch, dtype.itemsize)
        return bench_kernels.errors(op, work, [impl], dtype, setting.torch_device)[impl]

    for name, dtype in bench_kernels.DTYPES.items():
        outcome.judge(f"{op}, {where}, {name}", functools.partial(found, dtype))


def _dry(setting: Setting, outcome: Outcome) -> None:
    outcome.leave_out("Triton in bf16: the interpreter truncates it; torch's ops are judged in all three precisions")
    outcome.leave_out("shapes of production: one image of Swin-T's last stage on the CPU instead")
    shape = kernel_works.stage(SIZES["swin_tiny"], 3)
    for op in kernel_works.WORKS:
        if op not in FIRST_STAGE_ONLY:
            _against_float64(op, "stage 3 of swin_tiny", shape, 1, "torch", setting, outcome)
    command = [sys.executable, "-m", "benchmarks.proof.interpreted"]
    paths = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=harness.ROOT, text=True, capture_output=True, check=False)
    print(done.stdout, done.stderr, sep="\n")
    worst = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"exit status {done.returncode}"
    outcome.check("Triton's kernels in the interpreter, fp32", worst, "every op within its limit", not done.returncode)
