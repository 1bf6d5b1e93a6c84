"""Checkpoints of the published implementations, by objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastmim.objectives.dino import DINO
from fastmim.objectives.moco import MoCo

from .load import LoadReport, load_simmim
from .moco import load_moco
from .self_distilled import load_self_distilled


def load_reference(objective: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load a checkpoint of the objective's published implementation.

    SimMIM: microsoft/SimMIM and microsoft/Swin-Transformer, see :func:`.load_simmim`. iBOT and DINO: bytedance/ibot
    and facebookresearch/dino, see :func:`.load_self_distilled`. MoCo v3: facebookresearch/moco-v3, see
    :func:`.load_moco`.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named.
    """
    if isinstance(objective, DINO):
        return load_self_distilled(objective, state_dict)
    if isinstance(objective, MoCo):
        return load_moco(objective, state_dict)
    return load_simmim(objective, state_dict)
