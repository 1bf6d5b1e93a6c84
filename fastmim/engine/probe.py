"""Probes of an encoder: every so often during pretraining, and of a finished one by ``fastmim probe``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastmim.data.labelled import LabelledImages
from fastmim.engine.base import Engine
from fastmim.engine.checkpoint import convert
from fastmim.engine.checkpoint.whole import found_checkpoint
from fastmim.engine.distributed import World
from fastmim.engine.settings import image_arguments
from fastmim.evaluate.probe import Report, features, pooled, probe, quick_probe
from fastmim.evaluate.rank import rankme
from fastmim.interop import load_weights
from fastmim.interop.facts import read_facts
from fastmim.interop.timm_config import WEIGHTS_FILE
from fastmim.objectives import Objective

ENCODER_FILE = "encoder.safetensors"


class Watch:
    """What is measured of the encoder during pretraining; every rank has one and calls it.

    Args:
        engine: of the run, whose objective says which encoder.
        loader: of the labelled images, or of others.
        images: the labelled ones; None: RankMe of the loader's alone.
    """

    def __init__(self, engine: Engine, loader: Any, images: LabelledImages | None = None) -> None:
        self.engine, self.loader, self.images = engine, loader, images

    def __call__(self) -> dict[str, float]:
        """``knn_top1`` in per cent, with labels, and ``rankme``."""
        engine, batches = self.engine, self.loader.epoch(0)
        how: dict[str, Any] = {"autocast": engine.autocast(), "collective": engine.collective}
        if self.images is None:
            _, [[last]] = features(engine.objective, batches, [(1, True)], **how)
            return {"rankme": rankme(pooled(engine.objective, last))}
        images = self.images
        return quick_probe(
            engine.objective, batches, images.labels, images.held_out, classes=len(images.classes), **how
        )


def probe_encoder(
    source: str | Path,
    images: LabelledImages,
    world: World,
    *,
    micro_batch_size: int,
    reading: Mapping[str, Any],
    untrained: bool = False,
    called: str | Path | None = None,
    **how: Any,
) -> tuple[Report, dict[str, Any]]:
    """Probe an encoder on labelled images; every rank calls it.

    Args:
        source: a run's output folder or a checkpoint (of a teacher and a student the teacher), or an exported encoder.
        images: the images.
        world: this process.
        micro_batch_size: images of a rank in one forward pass.
        reading: arguments of :func:`fastmim.data.build_loader`.
        untrained: the same encoder with new weights, to compare with.
        called: what the log calls the source; None: its path.
        how: arguments of :func:`fastmim.evaluate.probe.probe`.

    Returns:
        What was found, and the encoder's settings.

    Raises:
        ValueError: there is no encoder at ``source``, or it does not say what it is.
    """
    with encoder_file(Path(source)) as file:
        objective = load_encoder(file, untrained=untrained, called=called or source).to(world.device)
    objective.has_gaps = reading.get("no_data") is not None

    def load(augmented: bool = False) -> Any:
        return images.loader(
            objective.img_size,
            augmented=augmented,
            in_chans=objective.in_chans,
            micro_batch_size=micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            **reading,
        )

    return probe(objective, images, load, **how), objective.encoder.settings


@contextmanager
def encoder_file(source: Path, *, student: bool = False) -> Iterator[Path]:
    """An encoder's file: itself, in an exported folder, or made of a run's newest checkpoint for as long as it is used.

    Args:
        source: a file or a folder.
        student: of a checkpoint with a teacher and a student the student.

    Raises:
        ValueError: there is none.
    """
    if source.is_file():
        yield source
        return
    checkpoint = found_checkpoint(source)
    if checkpoint is not None:
        with TemporaryDirectory() as folder:
            yield convert(checkpoint, Path(folder, ENCODER_FILE), student=student)
        return
    found = [source / name for name in (ENCODER_FILE, WEIGHTS_FILE) if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source}: no encoder there; give a run's output folder, a step-… folder or {ENCODER_FILE}")
    yield found[0]


def encoder_facts(file: Path) -> dict[str, Any]:
    """What the header of an encoder's file says of it: ``encoder``, its arguments, and ``statistics`` of its images.

    Raises:
        ValueError: the file is none, or does not say what encoder it holds.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            facts = read_facts(opened.metadata())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a readable .safetensors file ({' '.join(str(error).split())[:200]})") from None
    if not facts.get("encoder"):
        fix = f"fastmim pretrain CONFIG model.init_from={shlex.quote(str(file))} train.steps=1 optim.lr=0 makes one"
        raise ValueError(f"{file}: says nothing of its architecture; give a file that fastmim has exported ({fix})")
    return facts


def load_encoder(file: Path, *, untrained: bool = False, called: str | Path | None = None) -> Objective:
    """An encoder of a file that fastmim has written, with the statistics of its images, in an objective that does
    nothing else; ``untrained``: with new weights, the same at every call; ``called``: see :func:`.load_weights`.

    Raises:
        ValueError: the file does not say what encoder it holds.
    """
    facts = encoder_facts(file)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        objective = Objective(encoder=facts["encoder"], **image_arguments(facts.get("statistics", {})))
    if not untrained:
        load_weights(objective, file, called=called)
    return objective.eval()
