"""Checkpoints of microsoft/unilm's BEiT pretraining, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmim.objectives.beit import BEiT

from .encoder_names import BUFFERS
from .names import find_state_dict
from .strict import LoadReport, copy_strictly


def load_beit(objective: BEiT, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load the pretraining model, ``lm_head`` included.

    Args:
        objective: Built with the checkpoint's sizes and number of codes.
        state_dict: Official names, also wrapped as ``{"model": …}``.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named.
    """
    tensors = find_state_dict(state_dict).tensors
    report = LoadReport(skipped=[name for name in tensors if name.rsplit(".", 1)[-1] in BUFFERS])
    report.names = {name: own_name(name) for name in tensors if name not in set(report.skipped)}
    copy_strictly(objective, tensors, report)
    return report


def save_beit(objective: BEiT) -> dict[str, dict[str, Tensor]]:
    """What :func:`load_beit` reads and the reference's fine-tuning starts from: ``{"model": {official name: …}}``."""
    own = objective.named_parameters()
    return {"model": {official_name(name): tensor.detach().clone() for name, tensor in own}}


def own_name(name: str) -> str:
    """The parameter of the objective that an official name means."""
    return name.replace("lm_head.", "head.") if name.startswith("lm_head.") else f"encoder.{name}"


def official_name(name: str) -> str:
    """Inverse of :func:`own_name`."""
    return name.replace("head.", "lm_head.") if name.startswith("head.") else name.removeprefix("encoder.")
