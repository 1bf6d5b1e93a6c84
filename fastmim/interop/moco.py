"""Checkpoints of facebookresearch/moco-v3: both encoders, predictor and the statistics of their norms, in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmim.objectives.moco import MoCo

from .load import LoadReport, copy_strictly
from .names import find_state_dict

_MOMENTUM = "momentum_encoder."


def load_moco(objective: MoCo, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load a checkpoint of MoCo v3, or its base encoder and predictor alone, which the momentum encoder then follows.

    The reference moves the momentum encoder at the start of a step, fastmim at the end of the one before: the momentum
    encoder of a checkpoint of theirs is one move behind, which a run that starts from it leaves out.

    Args:
        objective: Built with the checkpoint's sizes.
        state_dict: The file's content, or its ``state_dict``, with or without ``module.`` before its names.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named. Statistics of BatchNorm are there
            for all layers or for none.
    """
    tensors = find_state_dict(state_dict).tensors
    report = LoadReport(names={name: own_name(name) for name in tensors})
    alone = not any(name.startswith(_MOMENTUM) for name in tensors)
    optional = [name for name in objective.state_dict() if name.startswith(_MOMENTUM)] if alone else []
    copy_strictly(objective, tensors, report, optional)
    if alone:
        objective.after_loading()
    return report


def save_moco(objective: MoCo) -> dict[str, dict[str, Tensor]]:
    """What :func:`load_moco` reads and the reference evaluates and fine-tunes: ``state_dict`` under its names."""
    own = {name: tensor.detach().clone() for name, tensor in objective.state_dict().items()}
    return {"state_dict": {f"module.{official_name(name)}": tensor for name, tensor in own.items()}}


def own_name(name: str) -> str:
    """The tensor of the objective that an official name means: the projector is the head of each encoder there."""
    name = re.sub(r"^base_encoder\.(head\.)?", lambda m: m[1] or "encoder.", name)
    return re.sub(r"^momentum_encoder\.(head\.)?", lambda m: _MOMENTUM + (m[1] or "encoder."), name)


def official_name(name: str) -> str:
    """Inverse of :func:`own_name`."""
    name = re.sub(r"^(encoder\.|head\.)", lambda m: "base_encoder." + m[1], name)
    return name.replace("encoder.encoder.", "encoder.")
