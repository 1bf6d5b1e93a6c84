"""``fastmim convert``: an encoder from one program's files into another's."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.engine.checkpoint.convert import CONFIG_FILE, OTHER_FORMATS, convert
from fastmim.engine.checkpoint.shards import Entry, write_safetensors
from fastmim.engine.checkpoint.whole import found_checkpoint
from fastmim.engine.onnx_file import export_onnx
from fastmim.engine.probe import encoder_file
from fastmim.files import replacing, write_text
from fastmim.interop.facts import header
from fastmim.interop.foreign import PREPROCESSOR_FILE, Foreign, known_project, read_encoder
from fastmim.interop.huggingface_config import huggingface_config, notes_on, preprocessor_config
from fastmim.interop.load import HEADER
from fastmim.interop.projects import PROJECTS
from fastmim.interop.timm_config import WEIGHTS_FILE, timm_config

ONNX = "onnx"
_PYTORCH = (".pth", ".pt")
_STATISTICS = {"mean": (0.5,), "std": (0.5,), "interpolation": "bicubic"}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass
class Conversion:
    """What :func:`convert_any` has done.

    Attributes:
        foreign: What was read; None where a checkpoint of a run went straight into a file, a tensor at a time.
        target: A key of :data:`PROJECTS`, or "onnx".
        out: What was written.
        notes: What differs there, or was not known.
        difference: Of ONNX Runtime's results.
    """

    foreign: Foreign | None
    target: str
    out: Path
    notes: list[str]
    difference: float | None = None


def convert_any(
    source: str | Path,
    out: str | Path,
    *,
    project: str | None = None,
    target: str | None = None,
    given: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    whole: bool = False,
    student: bool = False,
    average: bool = False,
) -> Conversion:
    """Read an encoder, and write it.

    Args:
        source: A run's output folder, a ``step-…`` folder, a weight file of any known kind, or a folder of timm's or
            transformers'.
        out: A ``.safetensors``, ``.pth`` or ``.onnx`` file, or a folder.
        project: Whose `source` is, of :data:`PROJECTS`; None: as its names tell.
        target: For whom it is written, of :data:`PROJECTS`; None: ours, or of a folder timm's.
        given: Arguments of the encoder, of another program's file that does not say them.
        statistics: ``mean`` and ``std`` of its images, likewise.
        whole: All weights of a run's objective.
        student: Not the teacher.
        average: Of a fine-tuning the weights' moving average.

    Raises:
        ValueError: In one line: as :func:`.read_encoder`; `target` has no such encoder, or does not fit `out`;
            there is no student or average in `source`.
    """
    source, out = Path(source), Path(out)
    known_project(project, "--from")
    if whole and student:
        raise ValueError("--student: --whole writes teacher and student; leave one of the two out")
    target = _target(out, target)
    ours = source.is_dir() and found_checkpoint(source) is not None
    if ours and (given or statistics or project not in (None, "fastmim")):
        raise ValueError(f"{source}: a checkpoint of fastmim says what it is; leave out --from and key=value")
    if whole or (ours and target in ("fastmim", "timm") and out.suffix not in _PYTORCH):
        if not ours:
            raise ValueError(f"--whole: {source} is no run or checkpoint of fastmim")
        return Conversion(None, target, convert(source, out, whole=whole, student=student, average=average), [])
    if average:
        fix = f"fastmim convert {source} average.safetensors --average first, and convert that"
        raise ValueError(f"--average: of a run of fastmim, into a .safetensors file or a folder for timm; {fix}")
    if ours:
        with encoder_file(source, student=student) as file:
            foreign = read_encoder(file)
    else:
        foreign = read_encoder(source, project=project, given=given, student=student)
    foreign.statistics |= statistics or {}
    return _write(foreign, target, out)


def _target(out: Path, target: str | None) -> str:
    """What to write: as said, or as the name tells.

    Raises:
        ValueError: The two do not fit.
    """
    if target == ONNX or (target is None and out.suffix == ".onnx"):
        if out.suffix != ".onnx":
            raise ValueError(f"{out}: must end in .onnx")
        return ONNX
    is_file = out.suffix in (".safetensors", *_PYTORCH)
    if target is None:
        if out.suffix in _PYTORCH:
            raise ValueError(f"{out}: for whom? give --to simmim, mae or another, or a name that ends in .safetensors")
        target = "fastmim" if is_file else "timm"
    known_project(target, "--to")
    if not is_file and (out.is_file() or out.suffix in OTHER_FORMATS):
        raise ValueError(f"{out}: must end in .safetensors, .pth or .onnx, or be a folder")
    folder = PROJECTS[target].folder
    if (is_file and target == "huggingface") or (not is_file and not folder):
        what = "a folder" if folder else "a file that ends in .safetensors or .pth"
        raise ValueError(f"{out}: --to {target} writes {what}")
    return target


def _write(foreign: Foreign, target: str, out: Path) -> Conversion:
    settings = foreign.settings
    if target != ONNX and not PROJECTS[target].fits(settings):
        raise ValueError(f"{out}: {PROJECTS[target].title} has no such {settings['name']}")
    statistics, notes = _statistics(foreign)
    if target == ONNX:
        said = header(settings, foreign.statistics | statistics)
        difference = export_onnx(foreign.tensors, settings, out, metadata=said)
        return Conversion(foreign, target, out, notes, difference)
    tensors = PROJECTS[target].write(foreign.tensors)
    if out.suffix in _PYTORCH:
        _write_pytorch(out, tensors, PROJECTS[target].place, header(settings, foreign.statistics))
        return Conversion(foreign, target, out, [])
    if out.suffix == ".safetensors":
        _write_weights(out, tensors, header(settings, foreign.statistics))
        return Conversion(foreign, target, out, [])
    configs = {CONFIG_FILE: _config(target, settings, statistics, out)}
    if target == "huggingface":
        notes += notes_on(settings)
        configs[PREPROCESSOR_FILE] = preprocessor_config(settings, **statistics)
    for name in (CONFIG_FILE, PREPROCESSOR_FILE):  # of other weights
        (out / name).unlink(missing_ok=True)
    _write_weights(out / WEIGHTS_FILE, tensors, header(settings, foreign.statistics))
    for name, content in configs.items():
        write_text(out / name, json.dumps(content, indent=2) + "\n")
    return Conversion(foreign, target, out, notes)


def _config(target: str, settings: dict[str, Any], statistics: Mapping[str, Any], out: Path) -> dict[str, Any]:
    try:
        return huggingface_config(settings) if target == "huggingface" else timm_config(settings, **statistics)
    except ValueError as reason:
        raise ValueError(f"{out}: {reason}; write a .safetensors file") from None


def _statistics(foreign: Foreign) -> tuple[dict[str, Any], list[str]]:
    """``mean``, ``std``, ``interpolation`` and what is known of ``pixels``, and what of them is not known: ImageNet's
    are then taken for colours."""
    usual = _STATISTICS | (_IMAGENET if foreign.settings["in_chans"] == 3 else {})
    known = {key: value for key, value in foreign.statistics.items() if value is not None}
    notes = [f"{key} {list(usual[key])} of the images is a guess; give data.{key}=[…] if it is wrong"
             for key in ("mean", "std") if key not in known]  # fmt: skip
    return usual | {key: known[key] for key in (*usual, "pixels") if key in known}, notes


def _write_weights(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    entries = [Entry(name, t.dtype, tuple(t.shape), partial(_itself, t)) for name, t in tensors.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        write_safetensors(unfinished, entries, metadata)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _write_pytorch(out: Path, tensors: Mapping[str, Tensor], place: str, said: dict[str, str]) -> None:
    """Tensors, dictionaries and strings: ``torch.load(weights_only=True)`` reads it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        # A view would be stored with all that it is a view of.
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        torch.save({place: own, HEADER: said}, unfinished)


def write_report(conversion: Conversion, file: str | Path) -> None:
    """A CSV table of every tensor of the source: its name, shape and type, what it has become, or why nothing.

    Raises:
        ValueError: There is none: a checkpoint of a run holds only what its objective has.
    """
    if conversion.foreign is None:
        raise ValueError("--report: tells of other programs' files; a run's encoder is copied as it is")
    with replacing(Path(file)) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(["name", "shape", "dtype", "becomes", "left out because"])
        for row in conversion.foreign.rows:
            table.writerow([row.name, "x".join(map(str, row.shape)), row.dtype, row.becomes, row.reason])
