"""What makes a rank's run, from the config: objective, loader, engine and schedule.

:func:`build` makes all of it, for ``train`` and ``fastmim profile``; the planner and the benchmarks take the parts
that they need from the same functions.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch

from fastmim.config import Config
from fastmim.data import build_loader
from fastmim.data.augment import View
from fastmim.data.index import ImageIndex
from fastmim.data.reading import opening_of
from fastmim.data.source import open_index
from fastmim.engine.base import Engine
from fastmim.engine.distributed import World
from fastmim.engine.graph import GraphEngine, kind_of, use_graph, why_not
from fastmim.engine.host_memory import keep_freed_memory
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.engine.precision import device_precision, warn_without_bf16
from fastmim.engine.prepare import prepare_kernels
from fastmim.engine.recompute import apply_recompute
from fastmim.engine.rng import seed_rank
from fastmim.engine.settings import image_arguments
from fastmim.engine.stream import batch_sizes
from fastmim.engine.zero import ZeroEngine
from fastmim.engine.zero.build import build_partitioned
from fastmim.engine.zero.config import deepspeed_config, import_deepspeed
from fastmim.engine.zero.nvme import check_nvme
from fastmim.interop import load_weights
from fastmim.models import encoder_settings
from fastmim.objectives import Objective, create_objective
from fastmim.objectives.schedule import Schedule, scale_lr
from fastmim.wording import plural

log = logging.getLogger("fastmim")

_OF_A_CROP = {"scale", "ratio", "hflip", "interpolation", "rot90"}
# Keys of the data section that are not arguments of build_loader: of images that are looked at.
_NOT_THE_LOADERS = {"val_path", "labelled_path", "labels", "val_labels"}


@dataclass(frozen=True)
class Parts:
    """What makes a rank's run; ``schedule.total_steps`` is its length."""

    objective: Any
    loader: Any
    engine: Engine
    schedule: Schedule
    weight_decay: Schedule | None
    global_batch: int


def build(cfg: Config, world: World, stack: ExitStack, index: ImageIndex | None = None) -> Parts:
    """Everything that a rank needs to train; ``stack`` closes the loader, ``index`` is that of ``data.path`` if known.

    Raises:
        ValueError: a setting that cannot work, in one line.
    """
    _, global_batch = step_sizes(cfg, world.size)
    deepspeed = make_deepspeed_config(cfg, world)
    objective = make_objective(cfg, world, deepspeed)
    prepare_kernels(
        lambda: recomputed_objective(cfg, offload=False),
        impl=cfg.efficiency.kernels,
        batch=cfg.train.micro_batch_size,
        precision=precision_on(cfg, world),
        low_weights=deepspeed is not None,
        world=world,
    )
    loader = stack.enter_context(closing(make_loader(cfg, objective, world, index=index)))
    engine = make_engine(cfg, objective, world, deepspeed)
    schedule = make_schedule(cfg, loader.steps_per_epoch, global_batch)
    weight_decay = make_weight_decay(cfg, schedule.total_steps)
    return Parts(objective, loader, engine, schedule, weight_decay, global_batch)


def step_sizes(cfg: Config, ranks: int) -> tuple[int, int]:
    """(micro-batches per step, images per step over all ranks).

    Raises:
        ValueError: the wanted global batch is not a whole number of micro-batches.
    """
    return batch_sizes(
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=cfg.train.grad_accum_steps,
        global_batch_size=cfg.train.global_batch_size,
        world_size=ranks,
    )


def make_deepspeed_config(cfg: Config, world: World) -> dict[str, Any] | None:
    """What DeepSpeed is told; None without ``efficiency.zero_stage``.

    Raises:
        ValueError: settings that it cannot serve, in one line.
    """
    efficiency = cfg.efficiency
    if efficiency.zero_stage is None:
        return None
    import_deepspeed(world.device)
    return deepspeed_config(
        stage=efficiency.zero_stage,
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=step_sizes(cfg, world.size)[0],
        world_size=world.size,
        clip_grad=None if cfg.optim.clip_each else cfg.optim.clip_grad,
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

    def load(objective: Any) -> None:
        if cfg.model.init_from is not None:
            try:
                load_weights(objective, cfg.model.init_from)
            except ValueError as error:
                raise ValueError(f"model.init_from={error}") from None

    def construct() -> Any:
        return recomputed_objective(cfg)

    if cfg.efficiency.zero_stage == 3 and deepspeed is not None:
        objective = build_partitioned(construct, load, config=deepspeed, precision=precision, device=world.device)
    else:
        objective = construct()
        load(objective)
    seed_rank(cfg.train.seed, world.rank)
    return objective.to(world.device)


def recomputed_objective(cfg: Config, *, offload: bool = True) -> Any:
    """:func:`build_objective`, whose blocks recompute in the backward pass what ``efficiency.recompute`` says.

    Without ``offload`` their inputs stay on the device, whatever the config says.
    """
    objective, efficiency = build_objective(cfg), cfg.efficiency
    every, offload = efficiency.recompute_every, offload and efficiency.recompute_offload
    apply_recompute(objective, efficiency.recompute, every=every, offload=offload)
    return objective


def build_objective(cfg: Config) -> Any:
    """The objective with weights from torch's generator, on torch's default device."""
    encoder = encoder_arguments(cfg)
    if "residual_dtype" in encoder_settings(encoder):
        encoder["residual_dtype"] = cfg.efficiency.residual_dtype
    return create_objective(
        cfg.objective.name,
        encoder=encoder,
        impl=cfg.efficiency.kernels,
        bands=cfg.output.bands,
        **image_arguments(cfg.data.model_dump()),
        **cfg.objective.arguments(),
    )


def encoder_arguments(cfg: Config) -> dict[str, Any]:
    """What the run trains, in arguments of :func:`fastmim.models.create_encoder`; its exported file says the same."""
    arguments = cfg.model.encoder_kwargs()
    if "policy" in encoder_settings(arguments):
        arguments.setdefault("policy", cfg.optim.policy)
    return arguments


def list_images(cfg: Config) -> ImageIndex | None:
    """The images of ``data.path`` and ``data.file_list``, for every loader of a run; None where none are read.

    Raises:
        ValueError: no folder is given, or it has no image.
    """
    data = cfg.data
    return None if data.loader == "synthetic" else open_index(data.path, data.file_list, **opening_of(data))


def make_loader(cfg: Config, objective: Any, world: World, **changes: Any) -> Any:
    """The training images of this rank; ``changes`` replace single arguments of ``build_loader``.

    Raises:
        ValueError: no folder is given, or it has no usable image.
    """
    crop = cfg.data.model_dump(include=_OF_A_CROP)
    views = [View(**view.over(crop)) for view in objective.views()]
    arguments = cfg.data.model_dump(exclude=_NOT_THE_LOADERS | _OF_A_CROP) | dict(
        views=views,
        img_size=views[0].size,
        in_chans=cfg.model.in_chans,
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=step_sizes(cfg, world.size)[0],
        rank=world.rank,
        world_size=world.size,
        seed=cfg.train.seed,
        device=world.device,
    )
    return build_loader(**arguments | changes)


def make_engine(cfg: Config, objective: Any, world: World, deepspeed: dict[str, Any] | None = None) -> Engine:
    """Optimiser and engine; with ``deepspeed`` its configuration.

    Raises:
        ValueError: an optimiser, or an offload to a drive, that does not work here.
    """
    optim, efficiency = cfg.optim, cfg.efficiency
    fused = efficiency.fused_optimizer
    if fused == "auto" and efficiency.offload_optimizer != "none" and world.device.type == "cuda":
        fused = "cpu_adam"

    def make_optimizer(params: list[Any]) -> torch.optim.Optimizer:
        return build_optimizer(optim.name, params, optim.lr, optim.betas, optim.eps, fused=fused)

    optimizer = make_optimizer(param_groups(objective, optim.weight_decay, optim.policy))
    precision, micro_batches = precision_on(cfg, world), step_sizes(cfg, world.size)[0]
    reason = why_not(
        optimizer,
        world=world,
        compile=efficiency.compile,
        zero_stage=efficiency.zero_stage,
        grad_accum_steps=micro_batches,
        recompute=efficiency.recompute,
        crops=sum(view.count for view in objective.views()) if isinstance(objective, Objective) else 1,
        decay_varies=optim.weight_decay_end is not None,
    )
    graphed = use_graph(efficiency.cuda_graph, reason, world.device, kind_of(objective))
    if deepspeed is not None:
        if "nvme" in (efficiency.offload_optimizer, efficiency.offload_param):
            check_nvme(deepspeed, lambda params: make_optimizer([{"params": params}]), world=world)
        clip_each = optim.clip_grad if optim.clip_each else None
        return ZeroEngine(
            objective, optimizer, config=deepspeed, precision=precision, world=world, clip_each=clip_each
        )
    options: dict[str, Any] = {
        "grad_accum_steps": micro_batches, "clip_grad": optim.clip_grad, "clip_each": optim.clip_each,
        "precision": precision, "world": world
    }
    if graphed:
        return GraphEngine(objective, optimizer, wanted=efficiency.cuda_graph, **options)
    return LocalEngine(objective, optimizer, compile=efficiency.compile, **options)


def make_weight_decay(cfg: Config, total: int) -> Schedule | None:
    """The weight decay of every step, half a cosine over the run; None where it is constant."""
    start, end = cfg.optim.weight_decay, cfg.optim.weight_decay_end
    return None if end is None else Schedule(name="cosine", base_lr=start, min_lr=end, total_steps=total)


def make_schedule(cfg: Config, steps_per_epoch: int, global_batch: int) -> Schedule:
    """The learning rate of every step; epochs become whole steps as in the references, rounded down."""
    optim = cfg.optim
    warmup = optim.warmup_steps
    total = cfg.train.steps or (cfg.train.epochs or 0) * steps_per_epoch
    schedule = Schedule(
        name=optim.schedule,
        base_lr=scale_lr(optim.lr, global_batch, optim.lr_batch),
        warmup_lr=scale_lr(optim.warmup_lr, global_batch, optim.lr_batch),
        min_lr=scale_lr(optim.min_lr, global_batch, optim.lr_batch if optim.scale_min_lr else None),
        total_steps=total,
        warmup_steps=int((optim.warmup_epochs or 0) * steps_per_epoch) if warmup is None else warmup,
        milestones=optim.milestone_steps or [epoch * steps_per_epoch for epoch in optim.milestones],
        decay_steps=optim.decay_steps or int((optim.decay_epochs or 0) * steps_per_epoch),
        gamma=optim.gamma,
        cosine_after_warmup=optim.cosine_after_warmup,
        warmup_inclusive=optim.warmup_inclusive,
        lag=optim.policy == "parity" if optim.schedule_lag is None else optim.schedule_lag,
    )
    if schedule.warmup_steps >= total:
        length = plural(schedule.warmup_steps, "step")
        log.warning("optim: the run ends at step %d, inside its warm-up of %s", total, length)
    late = [step for step in schedule.milestones if step >= total]
    if optim.schedule == "multistep" and late:
        log.warning("optim.milestones: the run ends at step %d, before the drops at %s", total, late)
    return schedule
