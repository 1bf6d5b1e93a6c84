"""``train(cfg)``: the whole run. With :mod:`fastmim.engine.build`, the last to read the config."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from fastmim.config import Config, save_config
from fastmim.engine import distributed
from fastmim.engine.base import Engine
from fastmim.engine.build import Parts, build, make_loader
from fastmim.engine.checkpoint import check_same_run, find_resume, load_checkpoint, read_state, set_aside
from fastmim.engine.distributed import World
from fastmim.engine.interrupt import StopRequest
from fastmim.engine.loop import train_step
from fastmim.engine.nonfinite import NonFiniteError, find_culprit
from fastmim.engine.run import Intervals, Run, TrainResult, make_folder
from fastmim.engine.stream import stream
from fastmim.evaluate.reconstruct import spread_images

__all__ = ["TrainResult", "train"]

log = logging.getLogger("fastmim")


def train(cfg: Config) -> TrainResult:
    """Pretrain as the config says, from the start or from the last checkpoint; alone or on every rank alike.

    On a CPU the process keeps the memory that it frees (:func:`~fastmim.engine.host_memory.keep_freed_memory`).
    SIGTERM and SIGINT end the run after the current step, with a checkpoint.

    Raises:
        ValueError: a setting that cannot work, in one line.
        FloatingPointError: the loss or a gradient became non-finite; names the step and the module.
    """
    zero = cfg.efficiency.zero_stage is not None
    with distributed.distributed(always=zero) as world, ExitStack() as stack:
        parts = build(cfg, world, stack)
        engine, loader, schedule, seed = parts.engine, parts.loader, parts.schedule, cfg.train.seed
        total = schedule.total_steps
        stored = {"run": run_identity(cfg, parts.global_batch), "total": total, "images": loader.fingerprint}
        shown = held_out_images(cfg, parts, world, stack)
        start = resume(cfg, engine, world, stored)
        run = stack.enter_context(closing(make_run(cfg, parts, world, stored, start, **shown)))
        stop = stack.enter_context(StopRequest())
        batches = stream(loader, start=start, stop=total, grad_accum_steps=engine.grad_accum_steps)
        lengths = {"total": total, "steps_per_epoch": loader.steps_per_epoch}
        try:
            for step in range(start, total):
                lr = schedule(step)
                train_step(engine, batches, lr=lr, seed=seed, phase=run.clock.phase, **lengths)
                run.after_step(step + 1, lr)
                if stop.agreed() and step + 1 < total:
                    return run.interrupted()
        except NonFiniteError as error:
            where = find_culprit(engine, loader, step=error.step, seed=seed)
            raise NonFiniteError(error.step, where) from None
        return run.finish()


def run_identity(cfg: Config, global_batch: int) -> dict[str, Any]:
    """Every setting that makes this another run if it changes: what is trained, not how fast or where."""
    kept = ("scale", "ratio", "hflip", "interpolation", "mean", "std", "weights", "component", "value_range", "alpha")
    tree = cfg.model_dump(mode="json", include={"model", "objective", "optim"})
    tree["data"] = cfg.data.model_dump(mode="json", include=set(kept))
    tree["model"].pop("init_from")
    # The default is not recorded: a checkpoint without the key goes on.
    if tree["data"]["alpha"] == "white":
        del tree["data"]["alpha"]
    flat = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return flat | {"train.seed": cfg.train.seed, "train.global_batch_size": global_batch}


def held_out_images(cfg: Config, parts: Parts, world: World, stack: ExitStack) -> dict[str, Any]:
    """The validation loader, and the few images that pictures show: held-out ones if there are any.

    Rank 0 draws the pictures; where its forward pass needs the others, they get the same images.
    """
    held_out: dict[str, Any] = dict(train=False, grad_accum_steps=1)
    val_loader, batch = None, None
    if cfg.data.val_path is not None:
        held_out |= dict(path=cfg.data.val_path, weights=None, file_list=None, field="data.val_path")
        val_loader = make_loader(cfg, parts.objective, world, **held_out)
        stack.enter_context(closing(val_loader))
    if cfg.output.pictures and world.is_main:
        alone = dict(rank=0, world_size=1, micro_batch_size=1, num_workers=0, verify="none")
        with closing(make_loader(cfg, parts.objective, world, **held_out | alone)) as loader:
            batch = spread_images(loader, cfg.output.pictures)
    if parts.engine.collective:
        batch = distributed.broadcast(batch and tuple(part.cpu() for part in batch))
        batch = batch and tuple(part.to(world.device) for part in batch)
    return {"val_loader": val_loader, "picture_batch": batch}


def resume(cfg: Config, engine: Engine, world: World, stored: dict[str, Any]) -> int:
    """Load the checkpoint that ``train.resume`` means, if any, and return the steps already done.

    Raises:
        ValueError: it belongs to another run, or is further than this run goes.
    """
    folder = Path(cfg.output.dir)
    root = folder / "checkpoints"
    path = find_resume(cfg.train.resume, root)
    start = 0
    if path is not None:
        state = read_state(path)
        check_same_run(state["run"], stored["run"], path)
        start = state["engine"]["step"]
        if start > stored["total"]:
            raise ValueError(f"train.steps={stored['total']}: {path} is at step {start} already; raise it")
        if state["total"] != stored["total"]:
            log.warning("the run was %d steps long and is %d now", state["total"], stored["total"])
        if state["images"] != stored["images"]:
            log.warning("the list of image files has changed since %s was written", path)
        load_checkpoint(path, engine, world=world, seed=cfg.train.seed)
        log.info("resuming from %s", path)
    distributed.barrier()
    if world.is_main:
        make_folder(folder)
        own = path is not None and path.resolve().parent == root.resolve()
        set_aside(root, after_step=start if own else -1)
        save_config(cfg, folder / "config.yaml")
    distributed.barrier()
    return start


def make_run(cfg: Config, parts: Parts, world: World, stored: dict[str, Any], start: int, **images: Any) -> Run:
    """The outputs of the run; ``images`` holds what :func:`held_out_images` has found."""
    train = cfg.train
    return Run(
        folder=Path(cfg.output.dir),
        engine=parts.engine,
        world=world,
        start=start,
        total=stored["total"],
        global_batch_size=parts.global_batch,
        every=Intervals(
            log=train.log_every, save=train.save_every, validate=train.val_every, picture=train.picture_every
        ),
        keep=train.keep,
        stored=stored,
        loader=parts.loader,
        val_batches=train.val_batches,
        tensorboard=cfg.output.tensorboard,
        encoder=cfg.model.encoder_kwargs(),
        **images,
    )
