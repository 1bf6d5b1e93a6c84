"""Checkpoints of bytedance/ibot and facebookresearch/dino: student, teacher and centres, in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmim.objectives.dino import DINO

from .encoder_names import BUFFERS, shift_downsample
from .names import without_wrappers
from .strict import LoadReport, copy_strictly

_LOSSES = {"ibot_loss": {"center": "centre.value", "center2": "patch_centre.value"},
           "dino_loss": {"center": "centre.value"}}  # fmt: skip


def load_self_distilled(objective: DINO, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load a checkpoint of iBOT or DINO, or the state dict of its student alone, which the teacher then equals.

    Args:
        objective: Built with the checkpoint's sizes.
        state_dict: ``student``, ``teacher`` and ``ibot_loss`` or ``dino_loss``, as the references save them; or
            ``backbone.…`` and ``head.…``, with or without ``module.`` before it.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named.
    """
    student, teacher, centres = _parts(state_dict)
    tensors = student | {f"teacher.{name}": tensor for name, tensor in teacher.items()}
    skipped = [name for name in tensors if name.rsplit(".", 1)[-1] in BUFFERS]
    skipped += _shared_heads(tensors, dict(objective.named_parameters()))
    if objective.encoder.mask_token is None:  # DINO hides nothing
        skipped += [name for name in tensors if name.endswith("masked_embed")]
    report = LoadReport(skipped=skipped)
    report.names = {name: own_name(name) for name in tensors if name not in set(skipped)}
    # DINO's checkpoints have no token for hidden patches; without a teacher's weights it starts as the student.
    optional = ["encoder.mask_token"]
    optional += [] if teacher else [n for n, _ in objective.named_parameters() if n.startswith("teacher.")]
    copy_strictly(objective, tensors, report, optional)
    if not teacher:
        objective.teacher.follow(objective.encoder, objective.head)
    buffers = dict(objective.named_buffers())
    for name, centre in ((name, centre) for name, centre in centres.items() if name in buffers):
        buffers[name].copy_(centre.view_as(buffers[name]))
    return report


def save_self_distilled(objective: DINO) -> dict[str, dict[str, Tensor]]:
    """What :func:`load_self_distilled` reads and the references resume from: student, teacher and centres."""
    own = {name: param.detach().clone() for name, param in objective.named_parameters()}
    student = {official_name(n): t for n, t in own.items() if not n.startswith("teacher.")}
    inside = {n.removeprefix("teacher."): t for n, t in own.items() if n.startswith("teacher.")}
    teacher = {official_name(n): t for n, t in inside.items()}
    for name in [name for name in student if name.endswith("masked_embed")]:  # theirs is (1, D)
        student[name] = student[name].flatten(0, 1)
    for tensors in (student, teacher):  # a shared head stands twice in their files
        for name in [name for name in tensors if name.startswith("head.last_layer.")]:
            tensors.setdefault(name.replace("last_layer.", "last_layer2."), tensors[name])
    buffers = {name: tensor.detach().clone() for name, tensor in objective.named_buffers()}
    loss = "ibot_loss" if "patch_centre.value" in buffers else "dino_loss"
    centres = {theirs: buffers[ours] for theirs, ours in _LOSSES[loss].items()}
    return {"student": {f"module.{n}": t for n, t in student.items()}, "teacher": teacher, loss: centres}


def own_name(name: str) -> str:
    """The parameter of the objective that an official name means."""
    return shift_downsample(re.sub(r"\bbackbone\.", "encoder.", name).replace("masked_embed", "mask_token"))


def official_name(name: str) -> str:
    """Inverse of :func:`own_name`."""
    return re.sub(r"\bencoder\.", "backbone.", shift_downsample(name, -1)).replace("mask_token", "masked_embed")


def _parts(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    if not isinstance(state_dict.get("student"), Mapping):
        return without_wrappers(state_dict), {}, {}
    centres = {
        own: state_dict[loss][theirs]
        for loss, names in _LOSSES.items() if loss in state_dict
        for theirs, own in names.items()
    }  # fmt: skip
    student, teacher = (without_wrappers(state_dict.get(who) or {}) for who in ("student", "teacher"))
    return student, teacher, centres


def _shared_heads(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """Names of the patches' last layers that are the class token's once more.

    Raises:
        ValueError: One is another, for which the objective has no place.
    """
    second = [name for name in tensors if ".last_layer2." in name and own_name(name) not in own]
    for name in second:
        first = tensors.get(name.replace("last_layer2", "last_layer"))
        if first is None or not torch.equal(first, tensors[name]):
            key = "shared_head_teacher" if name.startswith("teacher.") else "shared_head"
            raise ValueError(f"{name}: patches have a head of their own; build the objective with {key}=false")
    return second
