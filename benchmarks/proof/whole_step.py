"""The training step of an encoder beside timm's, eager and compiled: the same losses first, then time and memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.proof import model
from benchmarks.proof.part import Outcome, Setting
from benchmarks.train_step import Provider

BATCH, ROUNDS, WARM = 128, 10, 3


def swinv2_base(setting: Setting, outcome: Outcome) -> None:
    """SwinV2-B with the normalised target, bf16, 192 px."""
    _beside("swinv2_base", ("timm", "fastmim"), setting, outcome)


def swin_base(setting: Setting, outcome: Outcome) -> None:
    """Swin-B on raw pixels, bf16, 192 px."""
    _beside("swin_base", ("timm", "fastmim"), setting, outcome)


def swinv2_base_compiled(setting: Setting, outcome: Outcome) -> None:
    """The same beside timm's through ``torch.compile``, which takes most of this part's time."""
    _beside("swinv2_base", ("timm-compiled", "fastmim"), setting, outcome)


def swin_base_compiled(setting: Setting, outcome: Outcome) -> None:
    """As :func:`swinv2_base_compiled`."""
    _beside("swin_base", ("timm-compiled", "fastmim"), setting, outcome)


def _beside(size: str, names: tuple[str, str], setting: Setting, outcome: Outcome) -> None:
    """Both of ``names`` in turns; the first is the judge of the losses."""
    kwargs = model.encoder(size, tiny=setting.dry)
    if setting.dry:
        outcome.leave_out("Triton's kernels, torch.compile's code, bf16, batch 128 and a GPU's memory: tiny models on "
                          "the CPU in fp32, traced by torch.compile and run eagerly; no time is kept")  # fmt: skip
    dtype = "fp32" if setting.dry else "bf16"
    source = model.ours(kwargs, "torch", "cpu")
    images, mask = (t.to(setting.device) for t in model.batch(source, 2 if setting.dry else BATCH, "cpu"))
    makers = providers(kwargs, dtype, setting)
    seats = {name: seated(makers[name], images, mask, setting.device) for name in names}
    losses = {name: seat.losses for name, seat in seats.items()}
    refused = measure.refusals(losses, names[0], measure.TOLERANCE[dtype])
    for name, seat in seats.items():
        shown = "{:.5f}, {:.5f}".format(*seat.losses)
        outcome.check(f"{size}: {name}'s loss, and after two updates", shown, f"{names[0]}'s", name not in refused)
    clock = measure.clock_for(setting.device)
    calls = {name: _once(seats[name].step, images, mask, clock) for name in seats if name not in refused}
    for call in list(calls.values()) * (0 if setting.dry else WARM):
        call()
    phases = measure.interleave(calls, 1 if setting.dry else ROUNDS)
    if not setting.dry:
        _report(size, kwargs, phases, seats, len(images), outcome)


@dataclasses.dataclass
class Seat:
    """A provider, its losses on the given weights and after two updates, CSV columns of its own memory meanwhile."""

    step: Provider
    losses: tuple[float, float]
    memory: dict[str, str]


def providers(kwargs: dict[str, Any], dtype: str, setting: Setting) -> dict[str, Callable[[], Provider]]:
    """Name → what builds it on the same weights."""
    device, backend = setting.device, "eager" if setting.dry else "inductor"
    return {
        "timm": lambda: model.plain("timm", model.timms(kwargs, device), device, dtype),
        "fastmim": lambda: model.trained("fastmim", model.ours(kwargs, model.kernels_of(device), device), dtype),
        "timm-compiled": lambda: model.plain("timm-compiled", model.timms(kwargs, device), device, dtype,
                                             compiled=backend),
    }  # fmt: skip


def seated(make: Callable[[], Provider], images: Tensor, mask: Tensor, device: str) -> Seat:
    """Build a provider and take its first three steps."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    step = make()
    measure.reset_peak_memory(device)
    losses = measure.first_losses(step, images, mask)
    if device != "cuda":
        return Seat(step, losses, {})
    # Other providers' weights and moments lie in the same allocator.
    peak = torch.cuda.max_memory_allocated() - before
    return Seat(step, losses, {"peak_memory_gib": f"{peak / measure.GIB:.3f}", "memory_kind": "cuda allocator"})


def _once(step: Provider, images: Tensor, mask: Tensor, clock: measure.Clock) -> Callable[[], measure.Phases]:
    return lambda: measure.run_step(step, images, mask, clock)[0]


def _report(size: str, kwargs: dict[str, Any], phases: dict[str, list[measure.Phases]], seats: dict[str, Seat],
            images: int, outcome: Outcome) -> None:  # fmt: skip
    for name, own in phases.items():
        columns = measure.speed_columns(own, images, phases.get("fastmim", own)) | seats[name].memory
        outcome.note(f"{size}: {name}", f"{columns['images_per_sec']} images/s, {columns['ratio']} times ours, "
                     f"peak {columns['peak_memory_gib']} GiB")  # fmt: skip
        outcome.rows.append({
            "benchmark": "step", "case": f"{size}+{model.TARGET}" if model.norm_target(kwargs) else size,
            "dtype": "bf16", "batch": images, "img_size": kwargs["img_size"], "ranks": 1, "provider": name,
            "baseline": "fastmim", "rounds": len(own), "loss": f"{seats[name].losses[0]:.6f}", **columns,
        })  # fmt: skip
