"""``fastmim_kernels.accelerate`` on every Swin and SwinV2 that timm names: differences, counts, and a CPU timing.

    python benchmarks/accelerate_table.py                          # every name at its own size; minutes
    python benchmarks/accelerate_table.py --names swin_tiny_patch4_window7_224
    python benchmarks/accelerate_table.py --count                  # launches and bytes, batch 128, bf16, as on a GPU
    python benchmarks/accelerate_table.py --time swin_tiny_patch4_window7_224 swinv2_tiny_window8_256

The table: float32, one image, every parameter random and none of them zero (timm starts SwinV2's norms at zero, which
would switch its branches off), stochastic depth off. Relative difference: RMS of (accelerated − timm's) over RMS of
timm's, the largest over the input's and all parameters' gradients. Models of at most ``--float64`` million parameters
also show both sides' largest error against timm's own in float64.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import fastmim_kernels as fk  # noqa: E402
from benchmarks import command, harness, step_count  # noqa: E402

COUNTED = ("swin_base_patch4_window7_224", "swinv2_base_window8_256")
COLUMNS = ("name", "img_size", "params_million", "replaced", "left", "output_difference", "gradient_difference",
           "gradient_of", "output_error_timm", "output_error", "gradient_error_timm", "gradient_error",
           "date", "commit", "torch", "triton", "timm")


def names() -> list[str]:
    """Every Swin and SwinV2 of timm; SwinV2-CR is another model."""
    return [n for n in timm.list_models(["swin_*", "swinv2_*"]) if "_cr_" not in n]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights that keep the variance of their input; biases, tables and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = name.endswith("weight") and parameter.ndim > 1
            scale = parameter[0].numel() ** -0.5 if matrix else 0.2
            middle = 1.0 if "norm" in name and name.endswith("weight") else 2.0 if "logit_scale" in name else 0.0
            parameter.copy_(middle + scale * noise)


def results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of the images and of every parameter, for one random cotangent."""
    images = images.detach().requires_grad_()
    logits = model(images)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(logits, [images, *named.values()], cotangent)
    return {"output": logits.detach(), **dict(zip(("input", *named), grads, strict=True))}


def relative(value: Tensor, truth: Tensor) -> float:
    """RMS of the difference over the RMS of ``truth``."""
    difference = (value.double() - truth.double()).square().mean()
    return float((difference / truth.double().square().mean()).sqrt())


def largest(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient, and whose it is."""
    return max((relative(found[name], truth[name]), name) for name in truth if name != "output")


def compare(name: str, float64_millions: float) -> dict[str, Any]:
    """One row of the table."""
    model = timm.create_model(name, pretrained=False, drop_path_rate=0.0).eval()
    randomise(model)
    height, width = model.patch_embed.img_size
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(2))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    plain = results(model, images)
    truth = results(copy.deepcopy(model).double(), images.double()) if millions <= float64_millions else None
    report = fk.accelerate(model)
    ours = results(model, images)
    difference, whose = largest(ours, plain)
    row: dict[str, Any] = {
        "name": name, "img_size": f"{height}x{width}", "params_million": f"{millions:.1f}",
        "replaced": " ".join(f"{kind}:{len(paths)}" for kind, paths in report.replaced.items()),
        "left": " ".join(sorted(set(report.left.values()))) or "nothing",
        "output_difference": f"{relative(ours['output'], plain['output']):.1e}",
        "gradient_difference": f"{difference:.1e}", "gradient_of": whose, **step_count.versions()}
    if truth is not None:
        for suffix, side in (("_timm", plain), ("", ours)):
            row[f"output_error{suffix}"] = f"{relative(side['output'], truth['output']):.1e}"
            row[f"gradient_error{suffix}"] = f"{largest(side, truth)[0]:.1e}"
    return row


class Step(nn.Module):
    """A classifier's step in the form that ``step_count.count_step`` counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.patch_size = model.patch_embed.patch_size[0]

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(images).float().logsumexp(1).sum()}


def builder(name: str, accelerated: bool) -> Callable[[], nn.Module]:
    """Builds the step of timm's model, on fake tensors too; without stochastic depth."""

    def build() -> nn.Module:
        # timm reads these numbers out of a tensor, and a fake one has none.
        with (mock.patch.object(swin_transformer, "calculate_drop_path_rates", step_count._no_drop_path),
              mock.patch.object(swin_transformer_v2, "calculate_drop_path_rates", step_count._no_drop_path)):
            model = timm.create_model(name, pretrained=False)
        if accelerated:
            fk.accelerate(model)
        return Step(model)

    return build


def count(batch: int) -> list[dict[str, Any]]:
    """Launches, traffic and saved bytes of a step of both sides, as on a GPU."""
    rows = []
    for name in COUNTED:
        for side, accelerated in (("timm", False), ("accelerated", True)):
            size = timm.models.get_pretrained_cfg(name).input_size[-1]
            found = step_count.count_step(builder(name, accelerated), batch=batch, img_size=size)
            rows.append(step_count.row(name, side, found))
            print(f"{name} {side}: {found.launches} launches, {found.megabytes:.0f} MB/img, saved "
                  f"{found.saved_megabytes:.0f} MB/img, modelled {found.microseconds():.0f} us/img on an "
                  f"{step_count.GPUS[0].name}", flush=True)
    return rows


def time_pairs(chosen: Sequence[str], batch: int, rounds: int) -> None:
    """Forward and backward in turns, timm's and accelerated, on this CPU in float32."""
    for name in chosen:
        plain = timm.create_model(name, pretrained=False, drop_path_rate=0.0).train()
        randomise(plain)
        models = {"timm": plain, "accelerated": copy.deepcopy(plain)}
        fk.accelerate(models["accelerated"])
        images = torch.randn(batch, 3, *plain.patch_embed.img_size)

        def step(model: nn.Module, images: Tensor = images) -> None:
            model.zero_grad()
            model(images).logsumexp(1).sum().backward()

        timings = harness.interleave({k: lambda m=m: step(m) for k, m in models.items()}, rounds=rounds, warmup=3)
        ratio = harness.speedup(timings["timm"], timings["accelerated"])
        shown = ", ".join(f"{side} {timing.quantiles()[0]:.3f} s" for side, timing in timings.items())
        print(f"{name}, batch {batch}, float32: {shown}; {ratio[0]:.2f} times as fast ({ratio[1]:.2f} to "
              f"{ratio[2]:.2f}, 20 and 80 % of {rounds} rounds)", flush=True)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Into the table, in place of older rows of the same names."""
    old = command.read_csv(path) if path.exists() else []
    new = {row["name"] for row in rows}
    kept = [r for r in old if r["name"] not in new]
    command.write_csv(path, COLUMNS, sorted([*kept, *rows], key=lambda r: r["name"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("accelerate_table.py", __doc__)
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME",
                        help="models of timm (default: all, unless --count or --time is given)")  # fmt: skip
    parser.add_argument("--float64", type=float, default=30, metavar="MILLIONS",
                        help="parameters up to which both sides are also compared with timm's in float64")  # fmt: skip
    parser.add_argument("--count", action="store_true", help="launches and bytes instead, as on a GPU")
    parser.add_argument("--time", nargs="+", default=[], metavar="NAME", help="time these on the CPU instead")
    parser.add_argument("--batch", type=command.positive, help="images (default: 128 of --count, 8 of --time)")
    parser.add_argument("--rounds", type=command.positive, default=10, help="of --time")
    parser.add_results("accelerate.csv", "CSV whose rows of the same names are replaced; NAME_count.csv of --count")
    args = parser.parse_args(argv)
    for name in args.names or ([] if args.count or args.time else names()):
        row = compare(name, args.float64)
        print("  ".join(f"{key}={row[key]}" for key in COLUMNS[:12] if row.get(key)), flush=True)
        write([row], args.out)
    if args.count:
        step_count.write(count(args.batch or 128), args.out.with_name(f"{args.out.stem}_count.csv"))
    time_pairs(args.time, args.batch or 8, args.rounds)
    return 0


if __name__ == "__main__":
    command.exit_with("accelerate_table.py", main)
