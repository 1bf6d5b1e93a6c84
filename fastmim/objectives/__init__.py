"""Pretraining objectives: ``forward(images, mask) -> {"loss": …}``."""

from __future__ import annotations

import difflib
from typing import Any

from .simmim import SimMIM

OBJECTIVES = {"simmim": SimMIM}

__all__ = ["OBJECTIVES", "SimMIM", "create_objective"]


def create_objective(name: str, *, encoder: dict[str, Any], **kwargs: Any) -> SimMIM:
    """Build an objective, which owns its encoder and head.

    Args:
        name: "simmim".
        encoder: Keyword arguments of :func:`fastmim.models.create_encoder`; ``name`` is a family ("swin",
            "swinv2", "vit") or a size such as "swinv2_base".
        kwargs: Arguments of the objective, for SimMIM see :class:`fastmim.objectives.SimMIM`.

    Raises:
        ValueError: Unknown objective, encoder or argument value.
    """
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(str(name), OBJECTIVES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(OBJECTIVES)}"
        raise ValueError(f"objective name={name!r}: unknown; {hint}")
    return OBJECTIVES[name](encoder=encoder, **kwargs)
