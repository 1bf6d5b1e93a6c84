"""``train(cfg)``: the whole run. The config is read here and nowhere below."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from fastmim.config import Config, save_config
from fastmim.data import build_loader
from fastmim.data.augment import View
from fastmim.engine import checkpoint, distributed
from fastmim.engine.distributed import World
from fastmim.engine.host_memory import keep_freed_memory
from fastmim.engine.interrupt import StopRequest
from fastmim.engine.local import LocalEngine
from fastmim.engine.nonfinite import NonFiniteError, find_culprit
from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.engine.precision import device_precision, warn_without_bf16
from fastmim.engine.recompute import apply_recompute
from fastmim.engine.run import Intervals, Run, TrainResult
from fastmim.engine.stream import batch_sizes, stream
from fastmim.engine.zero import ZeroEngine
from fastmim.engine.zero_build import build_partitioned
from fastmim.engine.zero_config import deepspeed_config, import_deepspeed
from fastmim.engine.zero_nvme import check_nvme
from fastmim.evaluate.reconstruct import spread_images
from fastmim.interop import load_weights
from fastmim.objectives import create_objective
from fastmim.objectives.schedule import Schedule, scale_lr

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
        settings = cfg.train
        accum, global_batch = batch_sizes(
            micro_batch_size=settings.micro_batch_size,
            grad_accum_steps=settings.grad_accum_steps,
            global_batch_size=settings.global_batch_size,
            world_size=world.size,
        )
        deepspeed = make_deepspeed_config(cfg, world, accum) if zero else None
        objective = make_objective(cfg, world, deepspeed)
        loader = stack.enter_context(closing(make_loader(cfg, objective, world, accum)))
        engine = make_engine(cfg, objective, world, accum, deepspeed)
        total = settings.steps or (settings.epochs or 0) * loader.steps_per_epoch
        schedule = make_schedule(cfg, total, loader.steps_per_epoch, global_batch)
        stored = {"run": run_identity(cfg, global_batch), "total": total, "images": loader.fingerprint}
        shown = held_out_images(cfg, objective, world, stack, everywhere=engine.collective)
        start = resume(cfg, engine, world, stored)
        run = make_run(cfg, engine, world, stored, start, loader=loader, **shown)
        stack.enter_context(closing(run))
        stop = stack.enter_context(StopRequest())
        batches = stream(loader, start=start, stop=total, grad_accum_steps=accum)
        try:
            for step in range(start, total):
                lr = schedule(step)
                engine.set_lr(lr)
                for micro in range(accum):
                    objective.set_micro_batch(micro, accum)
                    with run.clock.waiting():
                        epoch, batch = next(batches)
                    mask = objective.random_mask(batch.sample_ids, seed=settings.seed, epoch=epoch)
                    loss = engine(batch.images, mask)["loss"]
                    engine.backward(loss)
                    engine.step()
                run.after_step(step + 1, lr)
                if stop.agreed() and step + 1 < total:
                    return run.interrupted()
        except NonFiniteError as error:
            where = find_culprit(engine, loader, step=error.step, seed=settings.seed)
            raise NonFiniteError(error.step, where) from None
        return run.finish()


def make_deepspeed_config(cfg: Config, world: World, accum: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Raises:
        ValueError: settings that it cannot serve, in one line.
    """
    efficiency = cfg.efficiency
    import_deepspeed(world.device)
    return deepspeed_config(
        stage=efficiency.zero_stage or 0,
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=accum,
        world_size=world.size,
        clip_grad=cfg.optim.clip_grad,
        precision=precision_on(cfg, world),
        offload_optimizer=efficiency.offload_optimizer,
        offload_param=efficiency.offload_param,
        nvme_path=efficiency.nvme_path,
        extra=efficiency.deepspeed,
    )


def precision_on(cfg: Config, world: World) -> str:
    """``efficiency.precision``, where auto has become fp32 or bf16.

    Raises:
        ValueError: this rank's GPU has no bfloat16, and bf16 is asked for.
    """
    return device_precision(cfg.efficiency.precision, world.device)


def make_objective(cfg: Config, world: World, deepspeed: dict[str, Any] | None = None) -> Any:
    """The objective on this rank's device, with the same first weights on every rank, or its share of them.

    Raises:
        ValueError: a setting that this device cannot serve, before anything is built.
    """
    precision = precision_on(cfg, world)
    warn_without_bf16(cfg.efficiency.precision, world.device)
    if cfg.efficiency.threads:
        torch.set_num_threads(cfg.efficiency.threads)
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.train.seed)
    efficiency, init_from = cfg.efficiency, cfg.model.init_from

    def load(objective: Any) -> None:
        if init_from is not None:
            load_weights(objective, init_from)

    def build() -> Any:
        return build_objective(cfg)

    if efficiency.zero_stage == 3 and deepspeed is not None:
        objective = build_partitioned(build, load, config=deepspeed, precision=precision, device=world.device)
    else:
        objective = build()
        load(objective)
    checkpoint.seed_rank(cfg.train.seed, world.rank)
    every, offload = efficiency.recompute_every, efficiency.recompute_offload
    apply_recompute(objective, efficiency.recompute, every=every, offload=offload)
    return objective.to(world.device)


def build_objective(cfg: Config) -> Any:
    """The objective with weights from torch's generator, on torch's default device."""
    return create_objective(
        cfg.objective.name,
        encoder={**cfg.model.encoder_kwargs(), "residual_dtype": cfg.efficiency.residual_dtype},
        impl=cfg.efficiency.kernels,
        mean=cfg.data.mean,
        std=cfg.data.std,
        **cfg.objective.arguments(),
    )


def make_loader(cfg: Config, objective: Any, world: World, accum: int, **changes: Any) -> Any:
    """The training images of this rank; ``changes`` replace single arguments.

    Raises:
        ValueError: no folder is given, or it has no usable image.
    """
    data = cfg.data
    given = dict(scale=data.scale, ratio=data.ratio, hflip=data.hflip, interpolation=data.interpolation)
    views = [View(**view.over(given)) for view in objective.views()]
    arguments: dict[str, Any] = dict(
        path=data.path,
        file_list=data.file_list,
        img_size=views[0].size,
        views=views,
        in_chans=cfg.model.in_chans,
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=accum,
        rank=world.rank,
        world_size=world.size,
        seed=cfg.train.seed,
        loader=data.loader,
        num_workers=data.num_workers,
        train=True,
        max_bad_fraction=data.max_bad_fraction,
        verify=data.verify,
        min_size=data.min_size,
        device=world.device,
    )
    return build_loader(**arguments | changes)


def make_engine(
    cfg: Config, objective: Any, world: World, accum: int, deepspeed: dict[str, Any] | None = None
) -> LocalEngine | ZeroEngine:
    """Optimiser and engine; with ``deepspeed`` its configuration."""
    optim, efficiency = cfg.optim, cfg.efficiency
    fused = efficiency.fused_optimizer
    if fused == "auto" and efficiency.offload_optimizer != "none" and world.device.type == "cuda":
        fused = "cpu_adam"

    def make_optimizer(params: list[Any]) -> torch.optim.Optimizer:
        return build_optimizer(optim.name, params, optim.lr, optim.betas, optim.eps, fused=fused)

    optimizer = make_optimizer(param_groups(objective, optim.weight_decay, optim.policy))
    precision = precision_on(cfg, world)
    if deepspeed is not None:
        if "nvme" in (efficiency.offload_optimizer, efficiency.offload_param):
            check_nvme(deepspeed, lambda params: make_optimizer([{"params": params}]), world=world)
        return ZeroEngine(objective, optimizer, config=deepspeed, precision=precision, world=world)
    return LocalEngine(
        objective,
        optimizer,
        grad_accum_steps=accum,
        clip_grad=optim.clip_grad,
        precision=precision,
        compile=efficiency.compile,
        world=world,
    )


def make_schedule(cfg: Config, total: int, steps_per_epoch: int, global_batch: int) -> Schedule:
    """The learning rate of every step; epochs become whole steps as in the references, rounded down."""
    optim = cfg.optim
    warmup = optim.warmup_steps
    schedule = Schedule(
        name=optim.schedule,
        base_lr=scale_lr(optim.lr, global_batch, optim.lr_batch),
        warmup_lr=scale_lr(optim.warmup_lr, global_batch, optim.lr_batch),
        min_lr=scale_lr(optim.min_lr, global_batch, optim.lr_batch),
        total_steps=total,
        warmup_steps=int((optim.warmup_epochs or 0) * steps_per_epoch) if warmup is None else warmup,
        milestones=optim.milestone_steps or [epoch * steps_per_epoch for epoch in optim.milestones],
        decay_steps=optim.decay_steps or int((optim.decay_epochs or 0) * steps_per_epoch),
        gamma=optim.gamma,
        cosine_after_warmup=optim.cosine_after_warmup,
        lag=optim.policy == "parity" if optim.schedule_lag is None else optim.schedule_lag,
    )
    if schedule.warmup_steps >= total:
        log.warning("optim: the run ends at step %d, inside its warm-up of %d steps", total, schedule.warmup_steps)
    late = [step for step in schedule.milestones if step >= total]
    if optim.schedule == "multistep" and late:
        log.warning("optim.milestones: the run ends at step %d, before the drops at %s", total, late)
    return schedule


def run_identity(cfg: Config, global_batch: int) -> dict[str, Any]:
    """Every setting that makes this another run if it changes: what is trained, not how fast or where."""
    kept = ("scale", "ratio", "hflip", "interpolation", "mean", "std")
    tree = cfg.model_dump(mode="json", include={"model", "objective", "optim"})
    tree["data"] = cfg.data.model_dump(mode="json", include=set(kept))
    tree["model"].pop("init_from")
    flat = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return flat | {"train.seed": cfg.train.seed, "train.global_batch_size": global_batch}


def resume(cfg: Config, engine: LocalEngine | ZeroEngine, world: World, stored: dict[str, Any]) -> int:
    """Load the checkpoint that ``train.resume`` means, if any, and return the steps already done.

    Raises:
        ValueError: it belongs to another run, or is further than this run goes.
    """
    folder = Path(cfg.output.dir)
    root = folder / "checkpoints"
    path = checkpoint.find_resume(cfg.train.resume, root)
    start = 0
    if path is not None:
        state = checkpoint.read_state(path)
        checkpoint.check_same_run(state["run"], stored["run"], path)
        start = state["engine"]["step"]
        if start > stored["total"]:
            raise ValueError(f"train.steps={stored['total']}: {path} is at step {start} already; raise it")
        if state["total"] != stored["total"]:
            log.warning("the run was %d steps long and is %d now", state["total"], stored["total"])
        if state["images"] != stored["images"]:
            log.warning("the list of image files has changed since %s was written", path)
        checkpoint.load_checkpoint(path, engine, world=world, seed=cfg.train.seed)
        log.info("resuming from %s", path)
    distributed.barrier()
    if world.is_main:
        make_folder(folder)
        own = path is not None and path.resolve().parent == root.resolve()
        checkpoint.set_aside(root, after_step=start if own else -1)
        save_config(cfg, folder / "config.yaml")
    distributed.barrier()
    return start


def make_folder(folder: Path) -> None:
    """Create ``output.dir``.

    Raises:
        ValueError: it is a file, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise ValueError(f"output.dir={folder}: cannot be created ({reason}); choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output.dir={folder}: cannot be written to; choose another folder")


def held_out_images(
    cfg: Config, objective: Any, world: World, stack: ExitStack, *, everywhere: bool = False
) -> dict[str, Any]:
    """The validation loader, and the few images that pictures show: held-out ones if there are any.

    Rank 0 draws the pictures; with ``everywhere`` its forward pass needs the others, who get the same images.
    """
    held_out: dict[str, Any] = {}
    if cfg.data.val_path is not None:
        held_out = dict(path=cfg.data.val_path, file_list=None, field="data.val_path")
    val_loader, batch = None, None
    if held_out:
        val_loader = make_loader(cfg, objective, world, 1, train=False, **held_out)
        stack.enter_context(closing(val_loader))
    if cfg.output.pictures and world.is_main:
        alone = dict(rank=0, world_size=1, micro_batch_size=1, num_workers=0, verify="none")
        with closing(make_loader(cfg, objective, world, 1, train=False, **alone, **held_out)) as loader:
            batch = spread_images(loader, cfg.output.pictures)
    if everywhere:
        batch = distributed.broadcast(batch and tuple(part.cpu() for part in batch))
        batch = batch and tuple(part.to(world.device) for part in batch)
    return {"val_loader": val_loader, "picture_batch": batch}


def make_run(
    cfg: Config, engine: LocalEngine | ZeroEngine, world: World, stored: dict[str, Any], start: int, **images: Any
) -> Run:
    """The outputs of the run; ``images`` holds its loaders."""
    train = cfg.train
    return Run(
        folder=Path(cfg.output.dir),
        engine=engine,
        world=world,
        start=start,
        total=stored["total"],
        global_batch_size=stored["run"]["train.global_batch_size"],
        every=Intervals(
            log=train.log_every, save=train.save_every, validate=train.val_every, picture=train.picture_every
        ),
        keep=train.keep,
        stored=stored,
        val_batches=train.val_batches,
        tensorboard=cfg.output.tensorboard,
        encoder=cfg.model.encoder_kwargs(),
        **images,
    )
