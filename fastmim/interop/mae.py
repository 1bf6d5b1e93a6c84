"""Checkpoints of facebookresearch/mae, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmim.objectives.mae import MAE

from .encoder_names import DECODER
from .names import find_state_dict
from .strict import LoadReport, copy_strictly

_PIXELS = "decoder_pred."
"""Of a patch's pixels the channel runs fastest there, and slowest here."""


def load_mae(objective: MAE, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load a pretraining checkpoint of facebookresearch/mae.

    Args:
        objective: Built with the checkpoint's sizes.
        state_dict: Official names (``patch_embed.…``, ``decoder_blocks.…``), also wrapped as ``{"model": …}``.

    Raises:
        ValueError: The decoder is not there, as in the files for fine-tuning; or a tensor is unknown, missing or of
            another shape, and all are named.
    """
    tensors = find_state_dict(state_dict).tensors
    if "mask_token" not in tensors and not any(name.startswith(DECODER) for name in tensors):
        raise ValueError("holds no decoder, as the checkpoints for fine-tuning do; use the one of pretraining")
    report = LoadReport(names={name: own_name(name) for name in tensors})
    pixels = {name: _turned(t, objective, back=False) for name, t in tensors.items() if name.startswith(_PIXELS)}
    copy_strictly(objective, tensors | pixels, report)
    return report


def save_mae(objective: MAE) -> dict[str, dict[str, Tensor]]:
    """What :func:`load_mae` and the reference read, as copies: ``{"model": …}``."""
    own = {name: param.detach().clone() for name, param in objective.named_parameters()}
    turned = {n: _turned(t, objective, back=True) for n, t in own.items() if n.startswith(_PIXELS)}
    return {"model": {official_name(n): tensor for n, tensor in (own | turned).items()}}


def own_name(name: str) -> str:
    """The parameter of the objective that an official name means."""
    return name if name.startswith(DECODER) or name == "mask_token" else f"encoder.{name}"


def official_name(name: str) -> str:
    """Inverse of :func:`own_name`."""
    return name.removeprefix("encoder.")


def _turned(tensor: Tensor, objective: MAE, *, back: bool) -> Tensor:
    """Rows of ``decoder_pred`` (p, p, C) → (C, p, p), or back; one of another length unchanged."""
    c, p = objective.in_chans, objective.stride
    shape, order = ((c, p, p), (1, 2, 0)) if back else ((p, p, c), (2, 0, 1))
    if tensor.ndim == 0 or len(tensor) != c * p * p:
        return tensor
    rows = torch.arange(len(tensor), device=tensor.device).view(shape).permute(order).flatten()
    return tensor[rows]
