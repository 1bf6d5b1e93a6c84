"""Weights for other programs from any checkpoint, sharded or not: one file, a tensor at a time, and its config.json."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastmim.engine.checkpoint.shards import Entry, Shards, write_safetensors
from fastmim.engine.checkpoint.whole import open_whole
from fastmim.engine.settings import image_facts, section_of
from fastmim.files import replacing, write_text
from fastmim.interop.facts import header
from fastmim.interop.timm_config import WEIGHTS_FILE, timm_config, why_not_timm

log = logging.getLogger("fastmim")

CONFIG_FILE = "config.json"
_ENCODER, _TEACHER, _AVERAGE = "encoder.", "teacher.encoder.", "average."
_AVERAGED = (_TEACHER, "momentum_encoder.")
"""Beside these the encoder is a student; MoCo v3's is what is exported anyway."""
OTHER_FORMATS = (".bin", ".ckpt", ".onnx", ".pkl", ".pt", ".pth")


def convert(
    checkpoint: str | Path, out: str | Path, *, whole: bool = False, student: bool = False, average: bool = False
) -> Path:
    """Write the encoder of a checkpoint under timm's names, as ``encoder.safetensors`` of a finished run is.

    Of iBOT and DINO it is the teacher's; of MoCo v3 the base encoder's, as in the reference.

    Whatever the number of ranks and the ZeRO stage that wrote it, one tensor is in memory at a time.

    Args:
        checkpoint: a ``step-…`` folder, a ``checkpoints`` folder or a run's output folder (its last checkpoint).
        out: the .safetensors file to write; it appears complete or not at all. Any other name is that of a folder,
            which gets ``model.safetensors`` and ``config.json``, as the Hugging Face hub, timm and transformers expect
            them.
        whole: all weights of the objective, under its own names, instead; into a file.
        student: the student's encoder, where there is a teacher.
        average: of a fine-tuning with ``objective.ema_decay`` the weights' moving average, which ``whole`` leaves out.

    Returns:
        ``out``.

    Raises:
        ValueError: no checkpoint there, one that ``train.resume`` would refuse as damaged, no student or average in it,
            a name that ends as that of another format, or a folder for what timm has no model for.
    """
    out = Path(out)
    file = out.suffix == ".safetensors"
    if not file and (whole or out.is_file() or out.suffix in OTHER_FORMATS):
        raise ValueError(f"{out}: must end in .safetensors, for example encoder.safetensors")
    folder, run = open_whole(checkpoint, "convert {path}")
    # Before export removes the config.json of an earlier conversion.
    _chosen(Shards(folder), folder, whole=whole, student=student, average=average)
    encoder = {key: value for key, value in section_of(run, "model").items() if value is not None}
    statistics = image_facts(section_of(run, "data"))
    said: dict[str, Any] = {"encoder": encoder, "statistics": statistics, "student": student, "average": average}
    if file:
        return consolidate(folder, out, whole=whole, **said)
    if reason := why_not_timm(encoder):
        raise ValueError(f"{out}: {reason}; write a .safetensors file")
    export(folder, out / WEIGHTS_FILE, **said)
    return out


def export(
    folder: Path, out: Path, *, encoder: dict[str, Any], statistics: dict[str, Any], **which: bool
) -> Path:
    """:func:`consolidate`, and beside the weights ``config.json`` for timm and transformers, if timm has such a model.

    An earlier ``config.json`` is removed first: it belongs to other weights.
    """
    config = out.with_name(CONFIG_FILE)
    config.unlink(missing_ok=True)
    consolidate(folder, out, encoder=encoder, statistics=statistics, **which)
    if reason := why_not_timm(encoder):
        log.info("%s: no %s beside it: %s", out, CONFIG_FILE, reason)
    else:
        prepared = {key: statistics[key] for key in ("mean", "std", "interpolation", "pixels") if key in statistics}
        content = timm_config(encoder, **prepared, weights=out.name)
        write_text(config, json.dumps(content, indent=2) + "\n")
    return out


def consolidate(
    folder: Path,
    out: Path,
    *,
    encoder: dict[str, Any] | None = None,
    statistics: dict[str, Any] | None = None,
    whole: bool = False,
    student: bool = False,
    average: bool = False,
) -> Path:
    """:func:`convert` for a checkpoint folder into a file.

    The file's metadata say the version, ``encoder``, with what it leaves to the size or to a default (image size,
    channels, window, …), and ``statistics`` of the images, see :func:`.image_facts`.
    """
    try:
        shards = Shards(folder)
        prefix, names = _chosen(shards, folder, whole=whole, student=student, average=average)
        # The mask token belongs to pretraining: timm's models have none.
        names = [name for name in names if whole or name != f"{_ENCODER}mask_token"]
        entries = [
            Entry(name.removeprefix(prefix), torch.float32, shards.shapes[name], partial(_weight, shards, name))
            for name in names
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as unfinished:
            write_safetensors(unfinished, entries, header(encoder or {}, statistics))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from None
    return out


def _chosen(shards: Shards, folder: Path, *, whole: bool, student: bool, average: bool) -> tuple[str, list[str]]:
    """What stands before the names of the tensors that are written, and those names.

    Raises:
        ValueError: there is no student, or no moving average.
    """
    taught = any(name.startswith(_TEACHER) for name in shards.shapes)
    if student and not any(name.startswith(_AVERAGED) for name in shards.shapes):
        raise ValueError(f"--student: {folder} has one encoder, and no teacher; leave --student out")
    prefix = (_AVERAGE if average else "") + ("" if whole else _TEACHER if taught and not student else _ENCODER)
    names = [name for name in shards.shapes if name.startswith(prefix) and name.startswith(_AVERAGE) == average]
    if not names:
        fix = "objective.ema_decay of a fine-tuning makes one; leave --average out"
        raise ValueError(f"--average: {folder} has no moving average; {fix}")
    return prefix, names


def _weight(shards: Shards, name: str) -> Tensor:
    return shards.tensor(name).float()
