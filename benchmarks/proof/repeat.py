"""What a repeated step must show: the same bits, and a host that never waits between two logged steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.proof import model
from benchmarks.proof.part import Outcome, Setting, one_line
from benchmarks.train_step import LR
from fastmim.engine.local import LocalEngine
from fastmim_kernels.common.dispatch import as_on_a_gpu

SIZES = ("swinv2_base", "swin_base")
STEPS = 3


def determinism(setting: Setting, outcome: Outcome) -> None:
    """The same steps twice, from the same weights: losses, every gradient and every weight, bit for bit."""
    if setting.dry:
        outcome.leave_out("Triton's kernels and production sizes: torch's ops on tiny models on the CPU instead")
    for size in SIZES:
        for dtype in ("fp32", "bf16"):
            first, again = (_history(size, dtype, setting) for _ in range(2))
            apart = model.bits_apart(first, again)
            outcome.check(f"{size} {dtype}: tensors of {len(first)} that differ in a second run", apart, "0", not apart)


def _history(size: str, dtype: str, setting: Setting) -> list[Tensor]:
    """Loss and gradients of every step, and the weights at the end."""
    objective = model.ours(model.encoder(size, setting.dry), model.kernels_of(setting.device), setting.device)
    step = model.trained("fastmim", objective, dtype)
    found: list[Tensor] = []
    for i in range(STEPS):
        loss = step.forward(*model.batch(objective, 2 if setting.dry else 16, setting.device, i))
        step.backward(loss)
        found.append(loss.detach())
        found += [p.grad.detach().clone() for p in objective.parameters() if p.grad is not None]
        step.update()
    return found + [p.detach().clone() for p in objective.parameters()]


def no_sync(setting: Setting, outcome: Outcome) -> None:
    """Steps of the engine, masks drawn on the device, with every synchronisation an error."""
    for size in SIZES:
        if setting.dry:
            _dry_sync(size, outcome)
            continue
        objective = model.ours(model.encoder(size), model.kernels_of(setting.device), setting.device)
        engine = model.engine(objective, "bf16")
        ids = torch.arange(16, device=setting.device)
        images = model.pictures(16, objective.img_size, setting.device)
        _steps(engine, objective, images, ids, 0)  # compiles, and makes what is kept
        found = _why(functools.partial(_strict, functools.partial(_steps, engine, objective, images, ids, 1)))
        outcome.check(f"{size}: synchronisations in {STEPS} steps", found or "none", "none", not found)
        mean = engine.read()["loss"]
        outcome.check(f"{size}: loss read after them", mean, "finite", mean == mean)
    if setting.dry:
        outcome.leave_out("torch.cuda's own watch: on fake tensors, a value that the host asks for is an error")


def _steps(engine: LocalEngine, objective: Any, images: Tensor, ids: Tensor, epoch: int) -> None:
    for _ in range(STEPS):
        engine.set_lr(LR)
        loss = engine(images, objective.random_mask(ids, epoch=epoch))["loss"]
        engine.backward(loss)
        engine.step()


def _strict(run: Callable[[], None]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _why(run: Callable[[], None]) -> str:
    """What it raised, in one line; empty where it did not."""
    try:
        run()
    except Exception as error:  # torch raises a RuntimeError, fake tensors have errors of their own
        return one_line(error)
    return ""


def _dry_sync(size: str, outcome: Outcome) -> None:
    """The engine's step on fake tensors, where ops choose as on a GPU and no value can be read."""

    def run() -> None:
        with FakeTensorMode(), as_on_a_gpu():
            objective = model.built(model.encoder(size, tiny=True), "auto")
            engine = model.engine(objective, "bf16")
            engine.check_every_step = False  # as on a GPU
            images = torch.empty(2, objective.in_chans, *objective.img_size)
            _steps(engine, objective, images, torch.arange(2), 0)

    found = _why(run)
    outcome.check(f"{size}: values read by the host, fake tensors", found or "none", "none", not found)
