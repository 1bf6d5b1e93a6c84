"""``fastmim profile``: from a config to a few profiled steps. Reads the config, as ``train`` does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastmim.config import Config
from fastmim.engine import distributed
from fastmim.engine.distributed import World
from fastmim.engine.stream import batch_sizes, stream
from fastmim.engine.train import make_deepspeed_config, make_engine, make_folder, make_loader, make_objective

from .summary import Row, as_text, summarise
from .timeline import Timeline

WARM_UP = 1
Batches = Iterator[tuple[Tensor, Tensor]]


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
        accum, global_batch = batch_sizes(
            micro_batch_size=cfg.train.micro_batch_size,
            grad_accum_steps=cfg.train.grad_accum_steps,
            global_batch_size=cfg.train.global_batch_size,
            world_size=world.size,
        )
        deepspeed = make_deepspeed_config(cfg, world, accum) if zero else None
        objective = make_objective(cfg, world, deepspeed)
        batches, source = _batches(cfg, objective, world, accum, 2 * steps + WARM_UP, stack)
        engine = make_engine(cfg, objective, world, accum, deepspeed)
        engine.set_lr(cfg.optim.lr)

        def step(phase: Callable[[str], Any]) -> None:
            for micro in range(accum):
                objective.set_micro_batch(micro, accum)
                with phase("data"):
                    images, mask = next(batches)
                with phase("forward"):
                    loss = engine(images, mask)["loss"]
                with phase("backward"):
                    engine.backward(loss)
                with phase("update"):
                    engine.step()

        for _ in range(WARM_UP):
            step(lambda name: nullcontext())
        timeline, seconds = _sampled(step, steps, world)
        found, rows = _profiled(step, steps, world)
        if world.is_main:
            found.export_chrome_trace(str(folder / "trace.json"))
            written = [folder / "trace.json", *timeline.save(folder), folder / "summary.json"]
            facts = _facts(world, steps, seconds, global_batch, timeline, source)
            rows_as_json = [row.__dict__ for row in rows]
            written[-1].write_text(json.dumps(facts | {"ops": rows_as_json}, indent=1) + "\n", encoding="utf-8")
            return _report(facts, rows, steps, world, timeline, written)
        return ""


def _sampled(step: Callable[[Any], None], steps: int, world: World) -> tuple[Timeline, float]:
    """(the timeline, seconds a step without the profiler)."""
    timeline = Timeline(world.device)
    _wait(world)
    began = time.perf_counter()
    with timeline:
        for _ in range(steps):
            step(timeline.phase)
        _wait(world)
    return timeline, (time.perf_counter() - began) / steps


def _profiled(step: Callable[[Any], None], steps: int, world: World) -> tuple[Any, list[Row]]:
    on_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(steps):
            step(record_function)
        _wait(world)
    return found, summarise(found.events(), on_gpu)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _batches(
    cfg: Config, objective: Any, world: World, accum: int, steps: int, stack: ExitStack
) -> tuple[Batches, str]:
    """(images and masks on the device, where they come from)."""
    if cfg.data.path is None and cfg.data.file_list is None:
        return _synthetic(cfg, objective, world), "synthetic images"
    loader = stack.enter_context(closing(make_loader(cfg, objective, world, accum)))

    def real() -> Batches:
        for epoch, batch in stream(loader, start=0, stop=steps, grad_accum_steps=accum):
            yield batch.images, objective.random_mask(batch.sample_ids, seed=cfg.train.seed, epoch=epoch)

    return real(), f"images of {cfg.data.path or cfg.data.file_list}"


def _synthetic(cfg: Config, objective: Any, world: World) -> Batches:
    size = cfg.train.micro_batch_size
    images, _ = objective.example(size)
    ids = torch.arange(size, device=world.device)
    epoch = 0
    while True:
        yield images, objective.random_mask(ids, seed=cfg.train.seed, epoch=epoch)
        epoch += 1


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
