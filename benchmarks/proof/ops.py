"""The ops one by one: the doctor, the self-test that training relies on, and float64 as the judge of every op."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks import bench_kernels, harness, kernel_works
from benchmarks.proof.part import Outcome, Setting
from fastmim.doctor import doctor
from fastmim.models.sizes import SIZES
from fastmim_kernels.check.self_test import CASES, DTYPES, Case, errors

BATCH = 16
STAGES = {"swinv2_base": (0, 2, 3), "swin_base": (0, 2)}
"""Of the encoders that are measured: first, deepest and last, where tiles and splits differ."""
FIRST_STAGE_ONLY = ("mask_tokens", "masked_l1", "linear_masked_l1", "local_norm_target", "position_bias")


def self_test(setting: Setting, outcome: Outcome) -> None:
    """What ``fastmim doctor`` says, and every case of the self-test in every precision."""
    report, status = doctor()
    print(report)
    outcome.check("fastmim doctor", f"exit status {status}", "0", status == 0)
    if setting.dry:
        outcome.leave_out("the self-test of Triton's kernels: there is no GPU; the doctor has tested torch's ops")
        return
    for case in CASES:
        _judge(case, DTYPES, setting, outcome, "triton")


def _judge(case: Case, dtypes: tuple[torch.dtype, ...], setting: Setting, outcome: Outcome, impl: str) -> None:
    for dtype in dtypes:
        error, limit = errors(case, setting.torch_device, dtype, impl)
        outcome.at_most(f"{case.op} {case.variant} {_short(dtype)}".replace("  ", " "), error, limit)


def _short(dtype: torch.dtype) -> str:
    return next(name for name, known in bench_kernels.DTYPES.items() if known == dtype)


def ops(setting: Setting, outcome: Outcome) -> None:
    """Forward and every gradient against float64, at odd shapes (the self-test's small ones) and those of encoders."""
    if setting.dry:
        _dry(setting, outcome)
        return
    for case in CASES:
        _judge(case, DTYPES, setting, outcome, "triton")
    for size, stages in STAGES.items():
        for stage in stages:
            for op in kernel_works.WORKS:
                if stage == 0 or op not in FIRST_STAGE_ONLY:
                    _at_stage(op, size, stage, BATCH, tuple(bench_kernels.DTYPES), "triton", setting, outcome)


def _at_stage(op: str, size: str, stage: int, batch: int, dtypes: tuple[str, ...], impl: str, setting: Setting,
              outcome: Outcome) -> None:  # fmt: skip
    shape = kernel_works.stage(SIZES[size], stage)
    for name in dtypes:
        dtype = bench_kernels.DTYPES[name]
        work = kernel_works.WORKS[op](shape, batch, dtype.itemsize)
        error, limit = bench_kernels.errors(op, work, [impl], dtype, setting.torch_device)[impl]
        outcome.at_most(f"{op}, stage {stage} of {size}, {name}", error, limit)


def _dry(setting: Setting, outcome: Outcome) -> None:
    outcome.leave_out("Triton in bf16: the interpreter truncates it; torch's ops are judged in all three precisions")
    outcome.leave_out("shapes of production: one image of Swin-T's last stage on the CPU instead")
    for op in kernel_works.WORKS:
        if op not in FIRST_STAGE_ONLY:
            _at_stage(op, "swin_tiny", 3, 1, tuple(bench_kernels.DTYPES), "torch", setting, outcome)
    command = [sys.executable, "-m", "benchmarks.proof.interpreted"]
    paths = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=harness.ROOT, text=True, capture_output=True, check=False)
    print(done.stdout, done.stderr, sep="\n")
    worst = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"exit status {done.returncode}"
    outcome.check("Triton's kernels in the interpreter, fp32", worst, "every op within its limit", not done.returncode)
