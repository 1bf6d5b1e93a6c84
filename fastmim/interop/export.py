"""Export of a pretrained encoder under timm's names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn


def export_encoder(objective: nn.Module, path: str | Path, *, encoder: dict[str, Any] | None = None) -> Path:
    """Write ``objective.encoder`` as safetensors that timm's model of the same size loads with ``strict=True``.

    The mask token is left out: it belongs to pretraining. The file appears complete or not at all.

    Args:
        objective: Any objective with an ``encoder``.
        path: File to write.
        encoder: Keyword arguments the encoder was built with, kept as JSON in the file's metadata.

    Returns:
        ``path``.
    """
    path = Path(path)
    state = objective.get_submodule("encoder").state_dict()
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in state.items() if k != "mask_token"}
    metadata = {"format": "pt", "source": "fastmim", "encoder": json.dumps(encoder or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
    return path
