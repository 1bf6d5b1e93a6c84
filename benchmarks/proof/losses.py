"""Fifty real steps of three implementations of one model: their losses must be the same, and fall.

In float64 nothing but the formula is left to differ. In the other precisions every run moves away from every other:
the gradient of an L1 loss is a sign, which rounding turns over where prediction and target meet. How far is measured
beside it, on timm's model with weights that are one rounding away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.proof import model
from benchmarks.proof.part import Outcome, Setting

STEPS = 50
DEPTHS = (2, 2, 2, 2)
"""Every kind of block, with and without a shift."""
LEARNING_RATE = 1e-3
EXACT = 1e-9
"""Relative, of every loss in float64."""
FACTOR, FLOORS = 4.0, {"fp32": 1e-4, "bf16": 2e-3}
"""Of what one rounding of the weights does, and what is forgiven beside it."""
ROUNDING = {"fp32": torch.float32, "bf16": torch.bfloat16}
FALL = 0.95
"""Of the mean of the first five losses: what the last five must stay below."""


def losses(setting: Setting, outcome: Outcome) -> None:
    """Triton's, torch's and timm's losses on the same weights, images, masks and plain AdamW."""
    model.exact_float32()
    if setting.dry:
        outcome.leave_out("Triton's losses: there is no GPU, and the interpreter is too slow for 50 steps")
        outcome.leave_out("bf16, and windows of production: tiny models in fp64 and fp32 on the CPU instead")
    for size in ("swinv2_tiny", "swin_tiny"):
        kwargs = model.encoder(size, tiny=setting.dry, depths=DEPTHS)
        count = 2 if setting.dry else 16
        _in_double(size, kwargs, setting, outcome, count)
        for dtype in ("fp32",) if setting.dry else ("fp32", "bf16"):
            _rounded(size, kwargs, dtype, setting, outcome, count)


def _in_double(size: str, kwargs: dict[str, Any], setting: Setting, outcome: Outcome, count: int) -> None:
    found = {name: run(name, kwargs, "fp64", setting.device, count) for name in ("torch", "timm")}
    apart = furthest(found["torch"], found["timm"])
    outcome.at_most(f"{size} fp64: torch's losses from timm's, {STEPS} steps", apart, EXACT)
    first, last = sum(found["timm"][:5]) / 5, sum(found["timm"][-5:]) / 5
    outcome.check(f"{size} fp64: the loss falls", f"{first:.4f} to {last:.4f}", f"below {FALL} of it",
                  last < FALL * first)  # fmt: skip


def _rounded(size: str, kwargs: dict[str, Any], dtype: str, setting: Setting, outcome: Outcome, count: int) -> None:
    names = ["torch"] if setting.dry else ["triton", "torch"]
    truth = run("timm", kwargs, dtype, setting.device, count)
    nearby = run("timm", kwargs, dtype, setting.device, count, nudged=True)
    limit = FACTOR * furthest(nearby, truth) + FLOORS[dtype]
    for name in names:
        apart = furthest(run(name, kwargs, dtype, setting.device, count), truth)
        outcome.at_most(f"{size} {dtype}: {name}'s losses from timm's, {STEPS} steps", apart, limit)


def run(name: str, kwargs: dict[str, Any], dtype: str, device: str, count: int, *, nudged: bool = False) -> list[float]:
    """Losses of every step.

    Args:
        name: "triton" or "torch" (ours), or "timm".
        kwargs: The encoder's.
        dtype: "fp64", "fp32" or "bf16" (autocast).
        device: "cpu" or "cuda".
        count: Images a step.
        nudged: Begin with weights that are one rounding of ``dtype`` away.
    """
    source = model.ours(kwargs, "torch", device)
    net: nn.Module = model.timms(kwargs, device) if name == "timm" else model.ours(kwargs, name, device)
    net = net.double() if dtype == "fp64" else net
    if nudged:
        _nudge(net, ROUNDING[dtype])
    step = model.plain(name, net, device, dtype, lr=LEARNING_RATE)
    found: list[Tensor] = []
    for i in range(STEPS):
        images, mask = model.batch(source, count, device, i)
        loss = step.forward(images.double() if dtype == "fp64" else images, mask)
        step.backward(loss)
        step.update()
        found.append(loss.detach())
    return [float(value) for value in torch.stack(found).tolist()]


@torch.no_grad()
def _nudge(net: nn.Module, dtype: torch.dtype) -> None:
    """Multiply every weight by 1 ± half a unit in the last place of ``dtype``, or for float32 a whole one."""
    generator = torch.Generator().manual_seed(0)
    size = max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps)
    for parameter in net.parameters():
        sign = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
        parameter.mul_(1 + sign * size)


def furthest(losses: list[float], truth: list[float]) -> float:
    """The largest relative difference of two runs; infinite where one is not finite."""
    apart = [abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True)]
    return max(apart) if all(value == value for value in apart) else float("inf")
