"""``fastmim plan``: from a config to a plan. With :mod:`fastmim.cli` and ``train`` the only reader of the config."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


from fastmim.config import Config
from fastmim.data.source import open_index
from fastmim.engine.stream import batch_sizes
from fastmim.engine.train import build_objective

from .hardware import Gpu
from .recommend import Model, Setting, best, options, smallest_machine
from .report import Plan
from .trace import BATCHES, Footprint, trace

IMAGENET_1K = 1_281_167
POLICIES = ("none",)


def make_plan(cfg: Config, *, gpu: Gpu, gpus: int, images: int | None = None) -> Plan:
    """Trace the config's objective under every recomputation policy and see what fits on ``gpus`` of ``gpu``.

    Args:
        images: Size of the data set; None: what is in ``data.path``, or else ImageNet-1k's.

    Raises:
        ValueError: the config's batches do not fit ``gpus``.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    accum, global_batch = batch_sizes(
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=cfg.train.grad_accum_steps,
        global_batch_size=cfg.train.global_batch_size,
        world_size=gpus,
    )
    model = _model(cfg)
    setting = Setting(0, POLICIES[0], cfg.train.micro_batch_size, accum, gpus)
    configured = model.option(gpu, setting)
    found = options(model, gpu, gpus, global_batch)
    fitting = [option for option in [*found, configured] if option.fits]
    smallest = None
    if not configured.fits:
        smallest = smallest_machine(model, setting, global_batch) or smallest_machine(model, None, global_batch)
    total, source = _images(cfg, global_batch, images)
    return Plan(
        title=cfg.model.name,
        parameters=model.trace(setting.policy, False).parameters,
        gpu=gpu,
        gpus=gpus,
        configured=configured,
        options=found,
        recommended=best(fitting) if fitting else None,
        smallest=smallest,
        images=total,
        images_from=source,
    )


def _model(cfg: Config) -> Model:
    precision = "fp32" if cfg.efficiency.precision == "fp32" else "bf16"

    @cache
    def footprint(policy: str, low_weights: bool) -> Footprint:
        small, large = (
            trace(lambda: build_objective(cfg), n, precision=precision, low_weights=low_weights) for n in BATCHES
        )
        return Footprint(small, large)

    return Model(footprint, POLICIES)


def _images(cfg: Config, global_batch: int, images: int | None) -> tuple[int, str]:
    """(images of the whole run, where that number is from)."""
    if cfg.train.steps:
        return cfg.train.steps * global_batch, f"{cfg.train.steps:,} steps of {global_batch}"
    source = "--images"
    if images is None:
        images, source = _data_set(cfg)
    epochs = cfg.train.epochs or 0
    # A shorter last batch is left out, as in training.
    steps = max(images // global_batch, 1) * epochs
    return steps * global_batch, f"{epochs} epochs of {images:,} images, {source}"


def _data_set(cfg: Config) -> tuple[int, str]:
    path, listed = cfg.data.path, cfg.data.file_list
    if (path is not None and Path(path).is_dir()) or listed is not None:
        return len(open_index(path, listed)), "data.file_list" if listed is not None else "data.path"
    return IMAGENET_1K, "ImageNet-1k's; give --images or data.path for others"
