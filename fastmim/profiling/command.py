"""``fastmim profile``: from a config to a few profiled steps. Reads the config, as ``train`` does."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastmim.config import Config
from fastmim.engine import distributed
from fastmim.engine.build import build
from fastmim.engine.distributed import World
from fastmim.engine.loop import train_step
from fastmim.engine.owner import make_folder
from fastmim.engine.stream import stream
from fastmim.files import write_text

from .summary import Row, as_text, summarise
from .timeline import Timeline

WARM_UP = 1
Step = Callable[..., Any]
"""One training step; ``phase`` marks what the host is doing."""


def profile_run(cfg: Config, *, steps: int = 3, out: Path | None = None) -> str:
    """Run one step to warm up, ``steps`` with memory and NVML sampled, and ``steps`` under torch's profiler.

    Images are synthetic unless ``data.path`` or ``data.file_list`` is given.

    Args:
        out: Folder for ``trace.json``, ``summary.json``, ``memory.json`` and ``memory.png``; default: ``profile`` in
            ``output.dir``.

    Returns:
        The report as text, on every rank alike.

    Raises:
        ValueError: a setting that cannot work, in one line.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps}: must be at least 1")
    zero = cfg.efficiency.zero_stage is not None
    with distributed.distributed(always=zero) as world, ExitStack() as stack:
        folder = out or Path(cfg.output.dir) / "profile"
        make_folder(folder)
        cfg, source = _with_images(cfg)
        parts = build(cfg, world, stack)
        engine, loader = parts.engine, parts.loader
        stop = 2 * steps + WARM_UP
        batches = stream(loader, start=0, stop=stop, grad_accum_steps=engine.grad_accum_steps)
        lengths = {"total": parts.schedule.total_steps, "steps_per_epoch": loader.steps_per_epoch}
        step = partial(train_step, engine, batches, lr=cfg.optim.lr, seed=cfg.train.seed, **lengths)
        for _ in range(WARM_UP):
            step()
        timeline, seconds = _sampled(step, steps, world)
        found, rows = _profiled(step, steps, world)
        if world.is_main:
            _export(found, folder / "trace.json")
            written = [folder / "trace.json", *timeline.save(folder), folder / "summary.json"]
            facts = _facts(world, steps, seconds, parts.global_batch, timeline, source)
            rows_as_json = [row.__dict__ for row in rows]
            write_text(written[-1], json.dumps(facts | {"ops": rows_as_json}, indent=1) + "\n")
            return _report(facts, rows, steps, world, timeline, written)
        return ""


def _sampled(step: Step, steps: int, world: World) -> tuple[Timeline, float]:
    """(the timeline, seconds a step without the profiler)."""
    timeline = Timeline(world.device)
    _wait(world)
    began = time.perf_counter()
    with timeline:
        for _ in range(steps):
            step(phase=timeline.phase)
        _wait(world)
    return timeline, (time.perf_counter() - began) / steps


def _profiled(step: Step, steps: int, world: World) -> tuple[Any, list[Row]]:
    on_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(steps):
            step(phase=record_function)
        _wait(world)
    return found, summarise(found.events(), on_gpu)


def _export(found: Any, path: Path) -> None:
    found.export_chrome_trace(str(path))
    # Kineto says nothing where it could not write, or not all.
    if not path.is_file() or not path.read_bytes().rstrip().endswith(b"}"):
        raise OSError(errno.EIO, "the trace could not be written in full; is there room on the disk?", str(path))


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _with_images(cfg: Config) -> tuple[Config, str]:
    """(the config, with synthetic images where it names none; where they come from)."""
    if cfg.data.path is None and cfg.data.file_list is None:
        data = cfg.data.model_copy(update={"loader": "synthetic"})
        return cfg.model_copy(update={"data": data}), "synthetic images"
    path = cfg.data.path or cfg.data.file_list
    shown = path if isinstance(path, str) else ", ".join(path or ())
    return cfg, f"images of {shown}"


def _facts(
    world: World, steps: int, seconds: float, global_batch: int, timeline: Timeline, source: str
) -> dict[str, Any]:
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {
        "device": name,
        "ranks": world.size,
        "torch": torch.__version__,
        "steps": steps,
        "images": source,
        "step_seconds": seconds,
        "images_per_sec": global_batch / seconds,
        "memory_kind": timeline.kind,
        "peak_memory_bytes": timeline.peak,
        "nvml": timeline.averages() or timeline.nvml.reason,
    }


def _report(
    facts: dict[str, Any], rows: list[Row], steps: int, world: World, timeline: Timeline, written: list[Path]
) -> str:
    averages = timeline.averages()
    power = (
        f"NVML: {averages['power_w']:.0f} W, utilisation {averages['utilization']:.0f} %, "
        f"{averages['device_bytes'] / 2**30:.1f} GiB of the device in use (means)"
        if averages
        else timeline.nvml.reason
    )
    lines = [
        f"{facts['device']}, {world.size} rank{'s' if world.size > 1 else ''}, {facts['images']}: "
        f"{facts['step_seconds']:.3f} s a step, {facts['images_per_sec']:,.1f} images/s (mean of {steps}, unprofiled)",
        "",
        as_text(rows, steps, "GPU" if world.device.type == "cuda" else "CPU"),
        "",
        f"peak memory {timeline.peak / 2**30:.2f} GiB {timeline.kind}",
        power,
        f"written: {', '.join(map(str, written))}",
    ]
    return "\n".join(lines) + "\n"
