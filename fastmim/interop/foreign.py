"""An encoder out of any file or folder that is known, with an account of every tensor there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import check_encoder, create_encoder, encoder_settings
from ..models.rules import policy_matters
from .encoder_names import encoder_names
from .facts import check_windows, spans_of_tensors
from .huggingface import PATCHES, from_huggingface
from .huggingface_config import settings_of, statistics_of
from .load import read_weights
from .names import find_state_dict, split_prefix
from .projects import PROJECTS, told_by
from .settings import find_settings
from .strict import LoadReport, check_strictly
from .timm_config import WEIGHTS_FILE, settings_of_timm

CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
_WEIGHT_FILES = (WEIGHTS_FILE, "encoder.safetensors", "pytorch_model.bin")
_INDEX = "model.safetensors.index.json"
_MASK_TOKEN = "mask_token"


class Row(NamedTuple):
    """A tensor of a file: which parameter it has become, or why none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str
    reason: str


class Said(NamedTuple):
    """What is written beside the weights: arguments of the encoder, statistics of images, remarks; whether by us."""

    settings: dict[str, Any]
    statistics: dict[str, Any]
    notes: list[str]
    ours: bool = False


@dataclass
class Foreign:
    """An encoder of another program's, or of ours.

    Attributes:
        project: A key of :data:`.projects.PROJECTS`.
        tensors: By our names, as stored.
        settings: All arguments of :func:`fastmim.models.create_encoder`.
        statistics: ``mean``, ``std`` and ``interpolation`` of the images, as far as they are known.
        rows: Every tensor there.
        place: Where in the file they were.
        notes: What is a guess, or differs.
        not_read: What else the file holds.
    """

    project: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    statistics: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    place: str = ""
    notes: list[str] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)


def read_encoder(
    source: str | Path, *, project: str | None = None, given: Mapping[str, Any] | None = None, student: bool = False
) -> Foreign:
    """Read an encoder, strictly: every tensor is used, or left out for a reason; none is missing.

    Nothing in a file is run.

    Args:
        source: A weight file, or a folder with ``config.json`` and weights, as timm and transformers have them.
        project: Whose it is; None: as its names tell.
        given: Arguments of the encoder that the file does not say, or says wrongly.
        student: Of a file with a teacher and a student the student.

    Raises:
        ValueError: In one line, with the path: it is missing or unreadable, a tensor is unknown, missing or of another
            shape, or the file does not say what the encoder is.
    """
    source = Path(source)
    try:
        return _read(source, project, given or {}, student)
    except ValueError as error:
        where = "" if str(error).startswith(str(source)) else f"{source}: "
        raise ValueError(f"{where}{error}") from None


def _read(source: Path, project: str | None, given: Mapping[str, Any], student: bool) -> Foreign:
    file = _weight_file(source) if source.is_dir() else source
    content, replaced, facts = read_weights(file)
    said = _said(facts, source if source.is_dir() else None)
    foreign = encoder_in(_student_of(content) if student else content, said, project=project, given=given)
    foreign.not_read += replaced
    return foreign


def encoder_in(
    content: Any, said: Said, *, project: str | None = None, given: Mapping[str, Any] | None = None
) -> Foreign:
    """The encoder in the content of a weight file; arguments and errors as of :func:`read_encoder`."""
    found = find_state_dict(content)
    hugging = any(name.endswith(PATCHES) for name in found.tensors)
    prefix = "" if hugging else split_prefix(found.tensors)
    told = told_by(list(found.tensors), [*found.place.split("."), *found.passed_over], prefix)
    if project not in (None, told) and "huggingface" in (project, told):
        raise ValueError(f"--from {project}: its names are those of {told}")
    place = ".".join(part for part in (found.place, prefix.rstrip(".")) if part)
    foreign = Foreign(project or ("fastmim" if said.ours else told), {}, {}, said.statistics, [], place,
                      list(said.notes), found.passed_over)  # fmt: skip
    read = _read_huggingface if hugging else _read_timm
    used, left = read(foreign, found.tensors, prefix, said.settings | dict(given or {}))
    rows = found.tensors.items()
    foreign.rows = [_row(name, tensor, used.get(name, ""), left.get(name, "")) for name, tensor in rows]
    return foreign


def _weight_file(folder: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / _INDEX).is_file():
        raise ValueError(f"its weights are spread over several files ({_INDEX}); write them as one")
    raise ValueError(f"no encoder there; give a run's output folder, a weight file, or a folder with {WEIGHTS_FILE}")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    return content if isinstance(content, dict) else {}


def _student_of(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not isinstance(content.get("student"), Mapping):
        raise ValueError("--student: there is no student in it")
    return {"student": content["student"]}


def _said(facts: Mapping[str, Any], folder: Path | None) -> Said:
    if facts.get("encoder"):
        return Said(dict(facts["encoder"]), dict(facts.get("statistics", {})), [], True)
    config = {} if folder is None else _json(folder / CONFIG_FILE)
    if folder is not None and "model_type" in config and "architecture" not in config:
        settings, notes = settings_of(config)
        return Said(settings, statistics_of(_json(folder / PREPROCESSOR_FILE)), notes)
    if "architecture" in config:
        return Said(*settings_of_timm(config), [])
    return Said({}, {}, [])


def _read_huggingface(
    foreign: Foreign, tensors: dict[str, Tensor], _: str, known: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    if "name" not in known:
        raise ValueError("weights of transformers without their config.json: give the folder, not the file")
    foreign.settings = _all_settings(known)
    encoder = _blank(foreign.settings)
    wanted = [name for name, _ in encoder.named_parameters() if name != _MASK_TOKEN]
    found, used, left = from_huggingface(tensors, wanted)
    _check(encoder, found, {name: name for name in found})
    foreign.tensors = found
    return used, left


def _read_timm(
    foreign: Foreign, tensors: dict[str, Tensor], prefix: str, known: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    inside = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    named = encoder_names(inside)
    used = {inside[name]: own for name, own in named.own.items()}
    left = {inside[name]: reason for name, reason in named.left_out.items()}
    left |= {name: f"not of the encoder under {prefix}" for name in tensors if not name.startswith(prefix)}
    found = {own: tensors[name] for name, own in used.items()}
    if "name" not in known or foreign.project != "fastmim":
        rest = {name: tensors[name] for name in left}
        known, notes = find_settings(found, rest, known, foreign.project)
        foreign.notes += notes
    settings = _all_settings(known)
    if foreign.project == "timm" and "policy" not in known and policy_matters(settings):
        settings["policy"] = "parity"  # timm shifts a map before it pads it
    _check(_blank(settings), {name: tensors[name] for name in used}, used)
    foreign.notes += check_windows(settings, spans_of_tensors({name: tensors[name] for name in left}))
    foreign.settings, foreign.tensors = settings, found
    return used, left


def _all_settings(known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        settings = encoder_settings({key: tuple(v) if isinstance(v, list) else v for key, v in known.items()})
        check_encoder(settings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its settings are those of no encoder ({' '.join(str(error).split())[:120]})") from None
    settings.pop("residual_dtype", None)
    return settings


def _blank(settings: Mapping[str, Any]) -> nn.Module:
    """The encoder, without memory."""
    with torch.device("meta"):
        return create_encoder(dict(settings))


def _check(encoder: nn.Module, tensors: Mapping[str, Tensor], names: dict[str, str]) -> None:
    """Every parameter is there, in its shape, and finite; ``names``: of each tensor the parameter that it is."""
    check_strictly(encoder, tensors, LoadReport(names=names), optional=(_MASK_TOKEN,))


def _row(name: str, tensor: Tensor, becomes: str, reason: str) -> Row:
    return Row(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), becomes, reason)


def known_project(name: str | None, option: str) -> str | None:
    """``name``, if it is one of :data:`.projects.PROJECTS` or none.

    Raises:
        ValueError: Names those that are known.
    """
    if name is not None and name not in PROJECTS:
        raise ValueError(f"{option} {name}: unknown; use one of {', '.join(PROJECTS)}")
    return name
