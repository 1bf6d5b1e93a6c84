"""``fastmim plan``: from a config to a plan."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from fastmim.config import Config
from fastmim.data.held_out import split
from fastmim.data.reading import opening_of
from fastmim.data.source import open_index
from fastmim.engine.build import recomputed_objective, step_sizes
from fastmim.engine.precision import auto_is_fp32, precision_of
from fastmim.engine.probe import ENCODER_FILE
from fastmim.engine.settings import image_arguments
from fastmim.engine.stream import micro_batch_that_fits
from fastmim.objectives import find_objective
from fastmim.wording import plural

from . import kept
from .hardware import Gpu, in_precision
from .memory import LAYOUTS, Buckets
from .recommend import RECOMPUTE, Model, Option, Setting, best, options, smallest_machine, stages_for
from .report import Plan
from .roofline import PCIE
from .trace import Footprint, trace

IMAGENET_1K = 1_281_167
_OFFLOADS = {(False, False): "none", (True, False): "optimizer", (False, True): "param", (True, True): "all"}
"""By (optimiser states, weights)."""


def make_plan(
    cfg: Config, *, gpu: Gpu, gpus: int, images: int | None = None, told: Callable[[int, int], None] | None = None
) -> Plan:
    """Trace the config's objective under every recomputation policy and see what fits on ``gpus`` of ``gpu``.

    Args:
        images: Size of the data set; None: what is in ``data.path``, or else ImageNet-1k's.
        told: Called with how many traces are made, of how many, whenever one is.

    Raises:
        ValueError: the config's batches do not fit ``gpus``, or its precision the GPU.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    if images is not None and images < 1:
        raise ValueError(f"--images {images}: must be at least 1")
    cfg, adapted = _adapted(cfg, gpus)
    accum, global_batch = step_sizes(cfg, gpus)
    precision = precision_of(cfg.efficiency.precision, name=gpu.name, bf16=gpu.bf16)
    gpu, setting = gpu.at(precision), _configured(cfg, accum, gpus)
    policies = list(dict.fromkeys([*RECOMPUTE, setting.policy]))
    total, source = _images(cfg, global_batch, images)
    with closing(Tracer(_with(cfg, precision=precision), told)) as tracer:
        model = _model(cfg, tracer, policies, precision)
        layouts = {stage > 0 for stage in (*stages_for(gpus, setting.offload, model.least_stage), setting.stage)}
        tracer.start((policy, low) for low in sorted(layouts) for policy in policies)
        configured = model.option(gpu, setting)
        found = options(model, gpu, gpus, global_batch, setting.offload)
        fitting = [option for option in [*found, configured] if option.fits]
        footprint = tracer.footprint(setting.policy, setting.stage > 0)
        return Plan(
            title=cfg.model.name,
            parameters=footprint.parameters,
            still=footprint.parameters - footprint.trained,
            gpu=gpu,
            gpus=gpus,
            configured=configured,
            options=found,
            recommended=best(fitting) if fitting else None,
            smallest=None if configured.fits else _smallest(cfg, model, setting, global_batch, precision),
            images=total,
            images_from=source,
            precision=precision,
            notes=(*adapted, *_notes(cfg, gpu)),
        )


class Tracer:
    """Footprints of a config by (policy, weights are bfloat16), each traced once, in a process of its own.

    Args:
        told: See :func:`make_plan`.
    """

    def __init__(self, cfg: Config, told: Callable[[int, int], None] | None = None) -> None:
        self._cfg, self._told = cfg, told
        # Not a fork of this process: autograd's threads do not survive one.
        context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(os.cpu_count(), mp_context=context)
        self._found: dict[tuple[str, bool], Future[Footprint]] = {}

    def start(self, wanted: Iterable[tuple[str, bool]]) -> None:
        """Begin the traces that :meth:`footprint` will be asked for, but for those that an earlier plan has made."""
        for key in wanted:
            if key in self._found:
                continue
            known = kept.look_up(_name_of(self._cfg, *key))
            if known is None:
                self._found[key] = self._pool.submit(trace_config, self._cfg, *key)
                self._found[key].add_done_callback(self._tell)
            else:
                self._found[key] = Future()
                self._found[key].set_result(known)

    def _tell(self, _: Future[Footprint]) -> None:
        if self._told is not None:
            self._told(sum(future.done() for future in list(self._found.values())), len(self._found))

    def footprint(self, policy: str, low_weights: bool) -> Footprint:
        """Of a micro-batch under a policy."""
        self.start([(policy, low_weights)])
        return self._found[policy, low_weights].result()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def _name_of(cfg: Config, policy: str, low_weights: bool) -> str:
    """For :mod:`.kept`: what :func:`trace_config` looks at."""
    sections = [section.model_dump(mode="json") for section in (cfg.model, cfg.objective)]
    how = cfg.efficiency.model_dump(mode="json", include={"kernels", "residual_dtype", "recompute_offload"})
    wide = cfg.efficiency.precision == "fp32"
    files = [stamp for value in sections[1].values() if isinstance(value, str) and (stamp := _stamp(Path(value)))]
    return kept.key_of(sections, files, how, wide, image_arguments(cfg.data.model_dump()), policy, low_weights)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file that an objective reads, or of a run's encoder; None where there is none."""
    with suppress(OSError, ValueError):
        found = (path / ENCODER_FILE if path.is_dir() else path).stat()
        return found.st_size, found.st_mtime_ns
    return None


def trace_config(cfg: Config, policy: str, low_weights: bool) -> Footprint:
    """The footprint of a config under a recomputation policy."""
    kept_as = _name_of(cfg, policy, low_weights)
    # float16 takes the same bytes and the same kernels as bfloat16, which is what auto is on most GPUs.
    precision = "fp32" if cfg.efficiency.precision == "fp32" else "bf16"
    name, _, every = policy.partition("/")
    offload = cfg.efficiency.recompute_offload and name == "full"
    cfg = _with(cfg, recompute=name, recompute_every=int(every or 1), recompute_offload=offload)
    low = low_weights and precision != "fp32"
    found = Footprint(*trace(lambda: recomputed_objective(cfg), precision=precision, low_weights=low))
    kept.keep(kept_as, found)
    return found


def footprint_of(cfg: Config, policy: str = "none") -> Footprint:
    """The footprint of a config under a policy with float32 weights: that of an earlier plan, or traced here."""
    return kept.look_up(_name_of(cfg, policy, False)) or trace_config(cfg, policy, False)


def _with(cfg: Config, **efficiency: Any) -> Config:
    """The config with other values in its section ``efficiency``."""
    return cfg.model_copy(update={"efficiency": cfg.efficiency.model_copy(update=efficiency)})


def _model(cfg: Config, tracer: Tracer, policies: list[str], precision: str) -> Model:
    return Model(
        tracer.footprint,
        policies,
        buckets=_buckets(cfg),
        layout=LAYOUTS[precision],
        nvme=_on_a_drive(cfg),
        least_stage=1 if precision == "fp16" else 0,
    )


def _smallest(
    cfg: Config, model: Model, setting: Setting, global_batch: int, precision: str
) -> tuple[Gpu, Option] | None:
    """The smallest known machine: one with bf16 under ``auto``, whatever that is on the GPU of the plan."""
    elsewhere = "bf16" if cfg.efficiency.precision == "auto" else precision
    known = in_precision(elsewhere)
    with ExitStack() as stack:
        if elsewhere != precision:
            tracer = stack.enter_context(closing(Tracer(_with(cfg, precision=elsewhere))))
            model = _model(cfg, tracer, list(model.policies), elsewhere)
        near = smallest_machine(model, setting, global_batch, setting.offload, known)
        return near or smallest_machine(model, None, global_batch, setting.offload, known)


def _configured(cfg: Config, accum: int, gpus: int) -> Setting:
    """The config's own way to run."""
    efficiency = cfg.efficiency
    offload = _OFFLOADS[efficiency.offload_optimizer != "none", efficiency.offload_param != "none"]
    every = f"/{efficiency.recompute_every}" if efficiency.recompute_every > 1 else ""
    policy = f"{efficiency.recompute}{every}"
    return Setting(efficiency.zero_stage or 0, policy, cfg.train.micro_batch_size, accum, gpus, offload)


def _adapted(cfg: Config, gpus: int) -> tuple[Config, tuple[str, ...]]:
    """The config with a micro-batch that fits so many GPUs, where its own is too large for the global batch."""
    train = cfg.train
    if train.global_batch_size is None or train.grad_accum_steps != 1:
        return cfg, ()
    size = micro_batch_that_fits(train.micro_batch_size, train.global_batch_size, gpus)
    if size in (0, train.micro_batch_size):  # 0: the config itself is told
        return cfg, ()
    fits = cfg.model_copy(update={"train": train.model_copy(update={"micro_batch_size": size})})
    return fits, (
        f"train.micro_batch_size={train.micro_batch_size}: no whole number of them on {plural(gpus, 'GPU')} makes the "
        f"global batch of {train.global_batch_size}; planned with {size}, which is to be given",
    )


def _on_a_drive(cfg: Config) -> str:
    """What of the offloaded is not in host RAM."""
    return _OFFLOADS[cfg.efficiency.offload_optimizer == "nvme", cfg.efficiency.offload_param == "nvme"]


def _notes(cfg: Config, gpu: Gpu) -> tuple[str, ...]:
    """What the numbers take for granted about this config."""
    notes = []
    if cfg.efficiency.precision == "auto" and not gpu.bf16:
        notes.append(auto_is_fp32(gpu.name))
    if of_micro_batch := find_objective(cfg.objective.name).of_micro_batch:
        notes.append(
            f"objective.name={cfg.objective.name}: its {of_micro_batch} are of the micro-batch over all GPUs; another "
            "one than in the config, as may be recommended, is another loss"
        )
    if cfg.efficiency.recompute_offload:
        notes.append(
            "efficiency.recompute_offload: under full and full/n the inputs of recomputed blocks are in host RAM "
            "(pinned buffers, which torch may round up to twice that), copied over PCIe at "
            f"{PCIE / 1e9:g} GB/s beside no compute"
        )
    if _on_a_drive(cfg) != "none":
        notes.append(
            "offload to nvme: neither the drive's speed (updates are timed as from RAM) nor DeepSpeed's buffers in RAM "
            "are modelled"
        )
    return tuple(notes)


def _buckets(cfg: Config) -> Buckets:
    given = cfg.efficiency.deepspeed.get("zero_optimization", {})
    sizes = {"reduce": given.get("reduce_bucket_size"), "prefetch": given.get("stage3_prefetch_bucket_size")}
    return Buckets(**{name: int(size) for name, size in sizes.items() if isinstance(size, int | float)})


def _images(cfg: Config, global_batch: int, images: int | None) -> tuple[int, str]:
    """(images of the whole run, where that number is from)."""
    if cfg.train.steps:
        return cfg.train.steps * global_batch, f"{plural(cfg.train.steps, 'step')} of {global_batch}"
    source = "--images"
    if images is None:
        images, source = _data_set(cfg)
    epochs = cfg.train.epochs or 0
    # A shorter last batch is left out, as in training.
    steps = max(images // global_batch, 1) * epochs
    return steps * global_batch, f"{plural(epochs, 'epoch')} of {plural(images, 'image')}, {source}"


def _data_set(cfg: Config) -> tuple[int, str]:
    path, listed = cfg.data.path, cfg.data.file_list
    paths = [] if path is None else [path] if isinstance(path, str) else path
    if (paths and all(Path(one).is_dir() for one in paths)) or listed is not None:
        opened = open_index(path, listed, **opening_of(cfg.data))
        if cfg.data.val_fraction is not None:
            opened = split(opened, cfg.data.val_fraction, held_out=False)
        return len(opened), "data.file_list" if listed is not None else "data.path"
    return IMAGENET_1K, "ImageNet-1k's; give --images or data.path for others"
