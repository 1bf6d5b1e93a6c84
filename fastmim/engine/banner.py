"""What is said before the first step: what trains on what, in which steps, and where its outputs go."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmim.engine.base import Engine
from fastmim.engine.distributed import World
from fastmim.engine.graph import GraphEngine
from fastmim.engine.zero.fragments import full_shape
from fastmim.wording import plural
from fastmim_kernels.common.dispatch import no_triton

Rows = list[tuple[str, str]]


def start_rows(
    *,
    engine: Engine,
    world: World,
    model: str,
    kernels: str,
    images: int,
    held_out: int | None,
    steps_per_epoch: int,
    global_batch: int,
    start: int,
    total: int,
    folder: Path,
) -> Rows:
    """Names and values of a run that begins or goes on.

    Args:
        engine: that trains.
        world: this process among all.
        model: name of the encoder.
        kernels: implementation of the ops that is asked for.
        images: of the training set.
        held_out: of the validation set; None: there is none.
        steps_per_epoch, global_batch: updates an epoch, images an update.
        start, total: updates done, and the length of the run.
        folder: ``output.dir``.
    """
    accum = engine.grad_accum_steps
    micro = global_batch // (accum * world.size)
    parts = [f"{micro} a rank", f"{world.size} ranks" * (world.size > 1), f"{accum} micro-batches" * (accum > 1)]
    product = " x ".join(part for part in parts if part)
    epochs = f"{total / steps_per_epoch:.4g}"
    length = f"{plural(total, 'step')} ({epochs} {'epoch' if epochs == '1' else 'epochs'})"
    return [
        ("model", f"{model}, {_millions(engine.objective)} parameters, {_millions(_encoder(engine))} of the encoder"),
        ("device", _device(world)),
        ("precision", f"{engine.precision}, kernels: {_kernels(kernels, engine)}"),
        ("images", f"{images:,}, {plural(steps_per_epoch, 'step')} an epoch"),
        ("held out", "none" if held_out is None else f"{held_out:,}, for the validation"),
        ("batch", f"{plural(global_batch, 'image')} a step" + (f" = {product}" if " x " in product else "")),
        ("length", length + (f", going on from step {start}" if start else "")),
        ("time", "said after the first steps" if start < total else "nothing left to do"),
        ("output", str(folder)),
    ]


def _encoder(engine: Engine) -> nn.Module:
    objective: Any = engine.objective
    encoder: nn.Module = getattr(objective, "encoder", objective)
    return encoder


def _millions(module: nn.Module) -> str:
    count = sum(math.prod(full_shape(parameter)) for parameter in module.parameters())
    return f"{count / 1e6:.3g} M"


def _device(world: World) -> str:
    several = f" on each of {world.size} ranks" if world.size > 1 else ""
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        return f"{found.name} ({found.total_memory / 2**30:.0f} GiB){several}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    here = "" if cores is None else f", {plural(cores, 'core')} here"
    return f"CPU ({kind}), {plural(threads, 'thread')}{several}{here}"


def _kernels(impl: str, engine: Engine) -> str:
    chosen = impl
    if impl == "auto":
        chosen = "torch" if no_triton(engine.device) else "triton"
    return chosen + (", each step one CUDA graph" if isinstance(engine, GraphEngine) else "")
