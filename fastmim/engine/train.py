"""``train(cfg)``: the whole run. With :mod:`fastmim.engine.build`, the last to read the config."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from fastmim._version import __version__
from fastmim.config import Config, save_config
from fastmim.data.index import ImageIndex
from fastmim.data.labelled import LabelledImages
from fastmim.data.reading import FROZEN, KEYS, opening_of, reading_of
from fastmim.data.worker_error import WaitInterrupted
from fastmim.engine import distributed
from fastmim.engine.banner import start_rows
from fastmim.engine.build import Parts, build, encoder_arguments, list_images, make_loader
from fastmim.engine.checkpoint import list_checkpoints, step_of
from fastmim.engine.distributed import World
from fastmim.engine.interrupt import StopRequest
from fastmim.engine.labels import Labelled, find_labels, give_labels
from fastmim.engine.loggers import check_loggers
from fastmim.engine.loop import train_step
from fastmim.engine.nonfinite import NonFiniteError, find_culprit
from fastmim.engine.owner import own_folder
from fastmim.engine.probe import Watch
from fastmim.engine.progress import said_if_slow
from fastmim.engine.result import TrainResult
from fastmim.engine.resume import find_start, go_on
from fastmim.engine.run import Intervals, Run
from fastmim.engine.settings import flat, image_facts
from fastmim.engine.stream import stream
from fastmim.evaluate.reconstruct import spread_images
from fastmim.models import encoder_settings
from fastmim.models.rules import policy_matters
from fastmim.objectives import Objective, find_objective
from fastmim.wording import plural

__all__ = ["TrainResult", "train"]


def train(cfg: Config, *, ends_process: bool = False) -> TrainResult:
    """Pretrain as the config says, from the start or from the last checkpoint; alone or on every rank alike.

    On a CPU the process keeps the memory that it frees (:func:`~fastmim.engine.host_memory.keep_freed_memory`).
    SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP end the run after the current micro-batch (on several ranks at most
    one later), with a checkpoint of the last finished step.

    Args:
        cfg: the run.
        ends_process: the process is there for this run alone: a second SIGTERM or SIGINT ends it
            (:class:`~fastmim.engine.interrupt.StopRequest`).

    Raises:
        ValueError: a setting that cannot work, in one line.
        FloatingPointError: the loss or a gradient became non-finite; names the step and the module.
        OSError: a file of the run cannot be written, or ``output.dir`` was deleted meanwhile; names it.
    """
    cfg, labelled = settle_classes(cfg)
    zero = cfg.efficiency.zero_stage is not None
    with distributed.distributed(always=zero) as world, ExitStack() as stack:
        distributed.check_same(shared_settings(cfg))
        distributed.on_main(lambda: check_loggers(cfg.output.loggers))
        with said_if_slow("preparing the model and the list of images", enabled=world.is_main):
            index = list_images(cfg) if labelled.index is None else labelled.index
            parts = build(cfg, world, stack, index=index)
        engine, loader, schedule, seed = parts.engine, parts.loader, parts.schedule, cfg.train.seed
        total = schedule.total_steps
        stored = {
            "run": run_identity(cfg, parts.global_batch, parts.objective),
            "total": total,
            "schedule": dataclasses.asdict(schedule),
            "images": loader.fingerprint,
        }
        shown = held_out_images(cfg, parts, world, stack, index)
        if labelled.classes:
            give_labels(parts.objective, labelled, loader, shown["val_loader"], table=cfg.data.val_labels)
        watch = make_watch(cfg, parts, world, stack, shown["val_loader"])
        distributed.check_same(shared_files(cfg, loader, shown["val_loader"], watch))
        distributed.on_main(lambda: stack.enter_context(own_folder(Path(cfg.output.dir))))
        start = resume(cfg, parts, world, stored)
        shown |= {"probe": watch, "classes": labelled.classes}
        run = stack.enter_context(closing(make_run(cfg, parts, world, stored, start, **shown)))
        stop = stack.enter_context(StopRequest(ends_process=ends_process))
        for waited_for in (loader, run.val_loader, None if watch is None else watch.loader):
            if waited_for is not None:
                waited_for.stop = lambda: stop.requested
        run.begin(banner(cfg, parts, world, start, shown["val_loader"]))
        batches = stream(loader, start=start, stop=total, grad_accum_steps=engine.grad_accum_steps)
        lengths = {"total": total, "steps_per_epoch": loader.steps_per_epoch}

        def stops() -> bool:
            """Between micro-batches and after a step, on every rank: the end? And is a row due by rank 0's clock?"""
            stop.number |= run.lost
            run.stopped_by, row = stop.agreed(run.wants_row())
            run.row_wanted |= row
            return run.stopped_by != 0

        try:
            for step in range(start, total):
                lr, decay = schedule(step), None if parts.weight_decay is None else parts.weight_decay(step)
                whole = train_step(
                    engine,
                    batches,
                    lr=lr,
                    lr_floor=schedule.floor(step),
                    weight_decay=decay,
                    seed=seed,
                    phase=run.clock.phase,
                    stops=stops,
                    **lengths,
                )
                if not whole:
                    return run.interrupted()
                run.after_step(step + 1, lr)
                if stops() and step + 1 < total:
                    return run.interrupted()
        except WaitInterrupted:
            if world.size > 1:  # the others are in this step and cannot save with us
                raise
            run.stopped_by = stop.number
            return run.interrupted()
        except NonFiniteError as error:
            where = find_culprit(engine, loader, step=error.step, seed=seed)
            back = distributed.broadcast(earlier_checkpoint(run.folder / "checkpoints", error.step - 1))
            raise NonFiniteError(error.step, where, back) from None
        return run.finish()


def settle_classes(cfg: Config) -> tuple[Config, Labelled]:
    """The config with the number of classes of ``data.path``, and its images with their classes, listed once.

    As it is, and nothing, where nobody needs labels.

    Raises:
        ValueError: no classes can be told, or others than ``objective.num_classes`` says.
    """
    data, own = cfg.data, cfg.objective.arguments()
    if not find_objective(cfg.objective.name).takes_labels or data.loader == "synthetic":
        return cfg, Labelled()
    several = bool(own.get("multi_label"))
    found = find_labels(data.path, data.file_list, data.labels, several=several, **opening_of(data))
    given, count = own.get("num_classes"), len(found.classes)
    if given not in (0, count):
        there = plural(count, "class", "classes")
        raise ValueError(f"objective.num_classes={given}: data.path has {there}; leave it 0, or give that")
    objective = cfg.objective.model_copy(update={"num_classes": count})
    return cfg.model_copy(update={"objective": objective}), found


def banner(cfg: Config, parts: Parts, world: World, start: int, val_loader: Any) -> list[tuple[str, str]]:
    """What is said before the first step."""
    return start_rows(
        engine=parts.engine,
        world=world,
        model=cfg.model.name,
        kernels=cfg.efficiency.kernels,
        images=parts.loader.num_images,
        held_out=None if val_loader is None else val_loader.num_images,
        steps_per_epoch=parts.loader.steps_per_epoch,
        global_batch=parts.global_batch,
        start=start,
        total=parts.schedule.total_steps,
        folder=Path(cfg.output.dir),
    )


def earlier_checkpoint(root: Path, step: int) -> str | None:
    """What ``train.resume`` takes to go back behind ``step``, where the newest checkpoint is of it; else None."""
    found = list_checkpoints(root)
    if not found or step_of(found[-1]) != step:
        return None
    return str(found[-2]) if len(found) > 1 else "none"


def shared_settings(cfg: Config) -> dict[str, Any]:
    """What must be the same on every rank: versions, and all settings but those that name a machine's own folders."""
    tree = cfg.model_dump(mode="json")
    for key in ("path", "file_list", "val_path", "labelled_path", "labels", "val_labels"):
        tree["data"].pop(key)
    tree["efficiency"].pop("nvme_path")
    return {"version of fastmim": __version__, "version of torch": torch.__version__, **flat(tree)}


def shared_files(cfg: Config, loader: Any, val_loader: Any, watch: Watch | None) -> dict[str, Any]:
    """The images that every rank must find, as counts and fingerprints of their names and order."""
    found = {"data.path" if cfg.data.path else "data.file_list" if cfg.data.file_list else "data.loader": loader}
    held_out = "data.val_path" if cfg.data.val_path is not None else "data.val_fraction"
    found |= {held_out: val_loader} if val_loader is not None else {}
    found |= {"data.labelled_path": watch.loader} if watch is not None else {}
    return {key: f"{one.num_images} images (names {one.fingerprint[:12]})" for key, one in found.items()}


_LATER = {
    "objective": ("visible_only", "decoder_dim", "decoder_depth", "decoder_num_heads", "crop_chunks",
                  "shared_head", "shared_head_teacher", "patch_out_dim", "ema_decay", "mask",
                  "head", "target", "target_stride", "norm_patch", "beta", "bins", "clusters", "tokenizer"),
    "data": ("alpha", "val_fraction", "pixels", "no_data", "rot90", "exif_orientation", "array", "channel_order"),
    "optim": ("scale_min_lr", "weight_decay_end", "clip_each", "warmup_inclusive")
}  # fmt: skip
"""Keys that older checkpoints lack: their default is not recorded, and such a checkpoint goes on."""


def run_identity(cfg: Config, global_batch: int, objective: Any) -> dict[str, Any]:
    """Every setting that makes this another run if it changes: what is trained, not how fast or where."""
    kept = {"scale", "ratio", "hflip", "rot90", "interpolation", "weights", "component", "val_fraction", *KEYS}
    tree = cfg.model_dump(mode="json", include={"model", "objective", "optim"})
    tree["data"] = cfg.data.model_dump(mode="json", include=kept - {"min_size"})
    tree["model"].pop("init_from")
    tree["model"]["policy"] = encoder_arguments(cfg).get("policy")
    for section, keys in _LATER.items():
        fields = type(getattr(cfg, section)).model_fields
        for key in [key for key in keys if key in fields and tree[section][key] == fields[key].default]:
            del tree[section][key]
    own = objective.identity() if isinstance(objective, Objective) else {}
    return flat(tree) | own | {"train.seed": cfg.train.seed, "train.global_batch_size": global_batch}


def with_policy(written: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """The settings of a checkpoint; where they lack ``model.policy``, its code knew timm's way alone."""
    encoder = encoder_settings(encoder_arguments(cfg))
    return {"model.policy": "parity" if policy_matters(encoder) else encoder.get("policy"), **written}


def held_out_images(
    cfg: Config, parts: Parts, world: World, stack: ExitStack, index: ImageIndex | None = None
) -> dict[str, Any]:
    """The validation loader, and the few images that pictures show: held-out ones if there are any.

    ``index``: the images of ``data.path``; None: they have not been listed.
    Rank 0 draws the pictures; where its forward pass needs the others, they get the same images.
    """
    held_out: dict[str, Any] = dict(train=False, grad_accum_steps=1, index=index)
    val_loader, batch = None, None
    if cfg.data.val_path is not None:
        held_out |= dict(path=cfg.data.val_path, index=None, weights=None, file_list=None, field="data.val_path")
    if cfg.data.val_path is not None or cfg.data.val_fraction is not None:
        val_loader = make_loader(cfg, parts.objective, world, **held_out)
        stack.enter_context(closing(val_loader))
        held_out |= dict(index=val_loader.index, val_fraction=None)
    if cfg.output.pictures and world.is_main:
        alone = dict(rank=0, world_size=1, micro_batch_size=1, num_workers=0, verify="none")
        with closing(make_loader(cfg, parts.objective, world, **held_out | alone)) as loader:
            batch = spread_images(loader, cfg.output.pictures)
    if parts.engine.collective:
        batch = distributed.broadcast(batch and tuple(part.cpu() for part in batch))
        batch = batch and tuple(part.to(world.device) for part in batch)
    return {"val_loader": val_loader, "picture_batch": batch}


def make_watch(cfg: Config, parts: Parts, world: World, stack: ExitStack, val_loader: Any) -> Watch | None:
    """What ``train.probe_every`` measures: of labelled images, or without them RankMe of the held-out ones."""
    data, train = cfg.data, cfg.train
    if data.labelled_path is None:
        return Watch(parts.engine, val_loader) if train.probe_every else None
    images = LabelledImages(
        data.labelled_path,
        table=data.labels,
        most=train.probe_images,
        field="data.labelled_path",
        **opening_of(data),
    )
    loader = images.loader(
        parts.objective.img_size,
        in_chans=cfg.model.in_chans,
        micro_batch_size=train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        **reading_of(data, *FROZEN),
    )
    return Watch(parts.engine, stack.enter_context(closing(loader)), images)


def resume(cfg: Config, parts: Parts, world: World, stored: dict[str, Any]) -> int:
    """Load the checkpoint that ``train.resume`` or ``train.branch_from`` means, if any; returns the steps done."""
    folder, train = Path(cfg.output.dir), cfg.train
    found = find_start(train.resume, train.branch_from, folder / "checkpoints", world)
    return go_on(
        found,
        parts.engine,
        world,
        stored,
        parts.schedule,
        folder=folder,
        allow=train.resume_changes == "allow",
        seed=train.seed,
        complete=lambda written: with_policy(written, cfg),
        write=lambda: save_config(cfg, folder / "config.yaml"),
    )


def make_run(cfg: Config, parts: Parts, world: World, stored: dict[str, Any], start: int, **images: Any) -> Run:
    """The outputs of the run; ``images`` holds what :func:`held_out_images` and :func:`make_watch` have found."""
    train = cfg.train
    return Run(
        folder=Path(cfg.output.dir),
        engine=parts.engine,
        world=world,
        start=start,
        total=stored["total"],
        global_batch_size=parts.global_batch,
        every=Intervals(
            log=train.log_every,
            seconds=train.log_seconds or 0,
            save=train.save_every,
            validate=train.val_every,
            picture=train.picture_every,
            probe=train.probe_every,
        ),
        keep=train.keep,
        stored=stored,
        loader=parts.loader,
        val_batches=train.val_batches,
        loggers=cfg.output.loggers,
        settings=flat(cfg.model_dump(mode="json")),
        encoder=encoder_arguments(cfg),
        statistics=image_facts(cfg.data.model_dump(mode="json")),
        **images,
    )
