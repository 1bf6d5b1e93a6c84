"""Launches, traffic, saved bytes and the modelled H100 time of every provider's step, counted on fake tensors.

Nothing here is a time: ``modelled_us_per_image`` is a roofline of CUDA's bf16 autocast policy. ``op_count.py`` shows
the same counts op by op.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness, options, providers, step_count  # noqa: E402
from benchmarks.providers import Case  # noqa: E402
from fastmim.plan.hardware import MEASURED as GPUS  # noqa: E402

COUNTED = ("fastmim", "timm", "microsoft-simmim", "microsoft-swin", "facebookresearch-mae")


def builder(name: str, case: Case, reference: str | None) -> Callable[[], nn.Module]:
    """Builds a provider's module with fake weights, inside a fake tensor mode.

    Raises:
        Unavailable: the provider has no such model.
    """
    if name in providers.PRESETS:
        return lambda: case.build()
    module = providers.foreign_module(name, case, case.weights(), reference)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # the fake kernels of a CPU's fused attention are not a GPU's

    return lambda: on_fake_weights(module)


def on_fake_weights(module: nn.Module) -> nn.Module:
    """A module of real weights with fake ones, inside a fake tensor mode."""
    # Encoders look at numbers while they are built; fake ones have none.
    mode = detect_fake_mode()
    assert mode is not None
    with unset_fake_temporarily():
        for part in module.modules():
            for key, value in part._parameters.items():
                part._parameters[key] = None if value is None else nn.Parameter(
                    mode.from_tensor(value.detach()), requires_grad=value.requires_grad
                )
            for key, buffer in part._buffers.items():
                part._buffers[key] = None if buffer is None else mode.from_tensor(buffer)
    module.patch_size = getattr(module, "patch_size", None) or module.patch
    return module


def model_gflop(case: Case) -> float:
    """GFLOP an image of the plain objective's matrix products, forward and backward: what the step must at least do."""
    fake = FakeTensorMode()
    with fake, mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor):
        objective: Any = case.build(kernels="reference").train()
        images = torch.empty(1, objective.in_chans, *objective.img_size)
        mask = torch.empty(1, *objective.encoder.grid, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            objective(images, mask)["loss"].backward()
    return counter.get_total_flops() / 1e9


def modelled_seconds(case: Case, device_name: str) -> float | None:
    """Modelled seconds an image of our step on a named GPU; None where its ceilings were never measured."""
    gpu = next((g for g in GPUS if g.name in device_name), None)
    if gpu is None:
        return None
    how: dict[str, Any] = dict(batch=case.batch, img_size=case.encoder()["img_size"], shares=case.shares())
    count = step_count.count_step(builder("fastmim", case, None), **how)
    return count.counter.seconds(gpu) / case.batch


def measure_case(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CSV rows of one case."""
    shared = {"benchmark": "counts", "note": "modelled on H100, not measured",
              **options.describe(case, 1, args), "device": "none"}  # fmt: skip
    rows = []
    for name in args.providers:
        try:
            build = builder(name, case, args.reference)
        except providers.Unavailable as reason:
            print(f"  not counted: {reason}", file=sys.stderr)
            continue
        size = case.encoder()["img_size"]
        count = step_count.count_step(build, batch=case.batch, img_size=size, shares=case.shares())
        launches, moved, flops = count.counter.totals()
        rows.append(shared | {
            "provider": name, "launches": launches, "mb_per_image": f"{moved / case.batch / 1e6:.1f}",
            "gflop_per_image": f"{flops / case.batch / 1e9:.2f}", "saved_mb_per_image": f"{count.saved_megabytes:.1f}",
            "modelled_us_per_image": f"{count.microseconds():.1f}",
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py counts", __doc__)
    options.add_shared(parser)
    parser.set_defaults(providers=list(COUNTED), batch=[128], dtypes=["bf16"], cases=list(options.CASES[1:]))
    args = parser.parse_args(argv)
    for case in options.cases(args):
        rows = measure_case(case, args)
        harness.append_rows(args.out, rows)
        for r in rows:
            print(
                f"{r['case']:15} {r['provider']:18} {r['launches']:6} launches  {r['mb_per_image']:>7} MB/image"
                f"  saved {r['saved_mb_per_image']:>6} MB/image  modelled H100 {r['modelled_us_per_image']} us/image",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    command.exit_with("run.py counts", main)
