"""Trains tiny objectives several times a rank: ``python ibot_worker.py RUNS.json [STEP]``.

RUNS.json holds a list of the arguments of :func:`train`. With STEP the last rank kills itself in that step, between the
update of the student and that of the teacher.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from fastmim.engine.checkpoint import load_checkpoint, save_checkpoint
from fastmim.engine.distributed import World, distributed, exit_process
from fastmim.engine.local import LocalEngine
from fastmim.engine.loop import train_step
from fastmim.engine.optim import param_groups
from fastmim.engine.recompute import apply_recompute
from fastmim.engine.zero import ZeroEngine
from fastmim.engine.zero.build import build_partitioned
from fastmim.engine.zero.config import deepspeed_config, import_deepspeed
from fastmim.objectives import create_objective
from fastmim.objectives.schedule import Schedule

STEPS, EPOCH, BATCH, LR, CLIP = 6, 2, 8, 2e-3, 0.05
MOMENTUM = 0.9
ENCODERS = {
    "vit": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "key_bias": True, "abs_pos_embed": True},
    "swin": {"patch_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
}
DECAY = Schedule(name="cosine", base_lr=0.04, min_lr=0.4, total_steps=STEPS)
ALONE = World(0, 1, 0, torch.device("cpu"))


DVAE = {"name": "dvae", "img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "codes": 12, "code_dim": 6}
BEIT = {"name": "vit", "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "shared_rel_pos_bias": True, "init_values": 0.1}  # fmt: skip


def new_objective(
    recompute: str = "none",
    momentum: float = MOMENTUM,
    encoder: str = "vit",
    name: str = "ibot",
    crop_chunks: int = 0,
    tokenizer: str | None = None,
    own_heads: bool = False,
) -> Any:
    """4 × 4 tokens a crop; of iBOT 32 prototypes that are still in the first epoch, and temperatures that warm up."""
    torch.manual_seed(0)
    if name == "dvae":
        return create_objective("dvae", encoder=DVAE, temperature_end=0.3)
    if name == "beit":
        objective = create_objective("beit", encoder=BEIT, tokenizer=tokenizer, num_mask=6, min_block=2, impl="torch")
        apply_recompute(objective, recompute)
        return objective
    settings = {"name": encoder, "img_size": 32, **ENCODERS[encoder]}
    if name == "classify":  # images are mixed with others of their micro-batch: without that, ranks make no difference
        own = {"num_classes": 3, "layer_decay": 0.8, "mixup": 0.0, "cutmix": 0.0, "ema_decay": momentum}
        objective = create_objective(name, encoder=settings, impl="torch", **own)
        objective.give_labels(torch.arange(BATCH, device="cpu") % 3)
        apply_recompute(objective, recompute)
        return objective
    if name == "moco":
        settings |= {"abs_pos_embed": "sincos_moco", "init": "moco"}
        own = {"hidden_dim": 24, "out_dim": 12, "momentum": momentum, "augment": False}
        objective = create_objective(name, encoder=settings, impl="torch", **own)
        apply_recompute(objective, recompute)
        return objective
    own = {"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 2, "local_size": 16, "augment": False}
    own |= {"crop_chunks": crop_chunks, "shared_head": not own_heads, "shared_head_teacher": not own_heads}
    schedules = {"warmup_teacher_temp_epochs": 2, "momentum_teacher": momentum, "freeze_last_layer": 1}
    objective = create_objective(name, encoder=settings, impl="torch", **own, **schedules)
    apply_recompute(objective, recompute)
    return objective


def batch_of(step: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """uint8 global crops (2, B, 3, 32, 32) and local ones, and the mask (2, B, 4, 4), of the whole global batch."""
    generator = torch.Generator().manual_seed(step)
    crops = [
        torch.randint(0, 256, (2, BATCH, 3, edge, edge), generator=generator, dtype=torch.uint8) for edge in (32, 16)
    ]
    return (crops[0], crops[1]), torch.rand(2, BATCH, 4, 4, generator=generator) < 0.4


def pairs_of(step: int) -> tuple[tuple[torch.Tensor], torch.Tensor]:
    """MoCo's two crops, and no mask. Images differ in their colour: BatchNorm divides by how much they do."""
    generator = torch.Generator().manual_seed(step)
    colour = torch.randn(BATCH, 3, 1, 1, generator=generator)
    crops = 0.7 * torch.randn(2, BATCH, 3, 32, 32, generator=generator) + colour
    return (crops,), torch.zeros(2, BATCH, 4, 4, dtype=torch.bool)


def inputs_of(name: str, step: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Crops (count, B, …) and mask of an objective; BEiT's masks hold 6 tokens each, so that all images count alike."""
    (first, second), mask = batch_of(step)
    if name == "ibot":
        return [first, second], mask
    if name == "dvae":
        return [second[0]], None
    if name == "classify":
        return [first[0]], None
    if name == "moco":
        pair, mask = pairs_of(step)
        return list(pair), mask
    order = torch.rand(BATCH, 16, generator=torch.Generator().manual_seed(step)).argsort(1).argsort(1)
    return [first[:1], second[:1]], (order < 6).view(BATCH, 4, 4)


def of_samples(crops: list[torch.Tensor], i: torch.Tensor) -> Any:
    """Those of samples ``i``, as the objective takes them."""
    return crops[0][i] if crops[0].ndim == 4 else [crop[:, i] for crop in crops]


def new_engine(
    world: World, stage: int | None, precision: str, accum: int, persistent: bool, offload: bool, **options: Any
) -> Any:
    """DDP for stage None. Small buckets; without ``persistent`` even the smallest tensor is cut at stage 3."""
    make, config = partial(new_objective, **options), None
    if stage is not None:
        import_deepspeed(world.device)
        zero: dict[str, Any] = {"reduce_bucket_size": 2000}
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 300 * persistent}
        config = deepspeed_config(
            stage=stage,
            micro_batch_size=BATCH // world.size // accum,
            grad_accum_steps=accum,
            world_size=world.size,
            clip_grad=None,
            precision=precision,
            offload_optimizer="cpu" if offload else "none",
            offload_param="cpu" if offload and stage == 3 else "none",
            extra={"zero_optimization": zero},
        )
    objective = make()
    if config is not None and stage == 3:
        objective = build_partitioned(make, config=config, precision=precision, device=world.device)
    # Adam divides by the root of the second moment: with the usual 1e-8, rounding alone would move a weight.
    optimizer = torch.optim.AdamW(param_groups(objective, 0.04), lr=LR, eps=1e-3)
    if config is None:
        return LocalEngine(
            objective,
            optimizer,
            grad_accum_steps=accum,
            clip_grad=CLIP,
            clip_each=True,
            precision=precision,
            world=world,
        )
    return ZeroEngine(objective, optimizer, config=config, precision=precision, world=world, clip_each=CLIP)


def train(
    out: str,
    *,
    world: World = ALONE,
    stage: int | None = None,
    precision: str = "fp32",
    accum: int = 1,
    persistent: bool = False,
    offload: bool = False,
    resume: str | None = None,
    save_at: tuple[int, ...] = (1, 3, STEPS),
    overflow_in: int | None = None,
    kill_in: int | None = None,
    **options: Any,
) -> None:
    """A run with scalars in ``out/metrics.jsonl``, checkpoints, and the teacher of the forward pass in ``out``."""
    torch.set_num_threads(1)
    engine = new_engine(world, stage, precision, accum, persistent, offload, **options)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        load_checkpoint(Path(resume), engine, world=world, seed=0)
    if kill_in is not None and world.rank == world.size - 1:
        die_after_the_students_update(engine, kill_in)
    for step in range(engine.steps, STEPS):
        overflows = overflowing(engine) if step == overflow_in else nullcontext()
        name = options.get("name", "ibot")
        images, mask = inputs_of(name, step)
        size = BATCH // world.size // accum
        ids = [torch.arange(size) + size * (world.rank + world.size * micro) for micro in range(accum)]
        batches = iter([(0, SimpleNamespace(images=of_samples(images, i), sample_ids=i)) for i in ids])
        if mask is not None:
            engine.objective.random_mask = lambda i, seed, epoch, mask=mask: mask[:, i] if mask.ndim == 4 else mask[i]
            engine.objective.prepare = lambda images, *_, **__: images
        lengths = {"total": STEPS, "steps_per_epoch": EPOCH}
        with overflows:
            train_step(engine, batches, lr=LR, weight_decay=DECAY(step), seed=0, **lengths)
        row = engine.read()
        if world.is_main:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if engine.steps in save_at:
            extra = {"run": {}, "total": STEPS, "images": ""}
            save_checkpoint(folder / "checkpoints", engine, extra, keep=99, world=world)
    if engine.objective.ema():
        publish(engine, folder, world, stage)
    if stage is not None:
        (folder / f"held-{world.rank}.json").write_text(json.dumps(engine.held_bytes()))


def publish(engine: Any, folder: Path, world: World, stage: int | None) -> None:
    """Write what the forward pass reads of the teacher."""
    teachers = {id(param) for teacher, _ in engine.objective.ema() for param in teacher.parameters()}
    params = {name: param for name, param in engine.objective.named_parameters() if id(param) in teachers}
    gathered: Any = nullcontext()
    if stage == 3:
        gathered = import_deepspeed(world.device).zero.GatheredParameters(list(params.values()))
    with gathered:
        if world.is_main:
            save_file({name: p.detach().clone() for name, p in params.items()}, folder / "teacher.safetensors")


class overflowing:
    """An update that finds an infinite gradient, which the engine skips as it does under fp16."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        engine = self.engine
        self._precision, self._step = engine.precision, engine._step
        if isinstance(engine, ZeroEngine):
            engine.precision = "fp16"  # a CPU has none: only what follows from it
            weight = engine.objective.head.last_layer.weight_v
            self._hook = weight.register_hook(lambda grad: grad + torch.inf)
        else:
            engine._step = self._skip

    def _skip(self, update: bool) -> bool:
        self.engine.optimizer.zero_grad()
        return False

    def __exit__(self, *_: Any) -> None:
        if isinstance(self.engine, ZeroEngine):
            self._hook.remove()
        self.engine.precision, self.engine._step = self._precision, self._step


def die_after_the_students_update(engine: Any, step: int) -> None:
    after = engine._after_update

    def die() -> None:
        if engine.steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        after()

    engine._after_update = die


def main() -> None:
    kill_in = int(sys.argv[2]) if len(sys.argv) > 2 else None
    with distributed(always=True) as world:
        for run in json.loads(Path(sys.argv[1]).read_text()):
            train(world=world, kill_in=kill_in, **run)
    exit_process(0)


if __name__ == "__main__":
    main()
