"""One file of weights from any checkpoint, sharded or not, a tensor at a time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastmim._version import __version__
from fastmim.engine.checkpoint.save import find_resume
from fastmim.engine.checkpoint.shards import Entry, Shards, write_safetensors
from fastmim.engine.checkpoint.whole import check_whole, instead_of
from fastmim.files import replacing

_ENCODER = "encoder."


def convert(checkpoint: str | Path, out: str | Path, *, whole: bool = False) -> Path:
    """Write the encoder of a checkpoint under timm's names, as ``encoder.safetensors`` of a finished run is.

    Whatever the number of ranks and the ZeRO stage that wrote it, one tensor is in memory at a time.

    Args:
        checkpoint: a ``step-…`` folder, a ``checkpoints`` folder or a run's output folder (its last checkpoint).
        out: the .safetensors file to write; it appears complete or not at all.
        whole: all weights of the objective, under its own names, instead.

    Returns:
        ``out``.

    Raises:
        ValueError: no checkpoint there, one that ``train.resume`` would refuse as damaged, or a name that does not end
            in .safetensors.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: must end in .safetensors, for example encoder.safetensors")
    try:
        folder = find_resume(str(checkpoint), Path())
    except ValueError:
        folder = None
    if folder is None:
        raise ValueError(f"{checkpoint}: no complete checkpoint there; give a step-… folder or a run's output folder")
    try:
        run = check_whole(folder)["run"]
    except ValueError as error:
        raise ValueError(f"{error}; {instead_of(folder, 'convert {path}')}") from None
    keys = {key.removeprefix("model."): value for key, value in run.items() if key.startswith("model.")}
    encoder = {key: value for key, value in keys.items() if value is not None}
    statistics = {key: run.get(f"data.{key}") for key in ("mean", "std")}
    return consolidate(folder, out, encoder=encoder, statistics=statistics, whole=whole)


def consolidate(
    folder: Path,
    out: Path,
    *,
    encoder: dict[str, Any] | None = None,
    statistics: dict[str, Any] | None = None,
    whole: bool = False,
) -> Path:
    """:func:`convert` for a checkpoint folder; ``encoder`` and ``statistics`` (mean, std of the images) are noted in
    the file's metadata."""
    try:
        shards = Shards(folder)
        prefix = "" if whole else _ENCODER
        names = [name for name in shards.shapes if name.startswith(prefix)]
        # The mask token belongs to pretraining: timm's models have none.
        names = [name for name in names if whole or name != f"{_ENCODER}mask_token"]
        entries = [
            Entry(name.removeprefix(prefix), torch.float32, shards.shapes[name], partial(_weight, shards, name))
            for name in names
        ]
        metadata = {"format": "pt", "source": "fastmim", "version": __version__, "encoder": json.dumps(encoder or {})}
        metadata |= {"statistics": json.dumps(statistics)} if statistics else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as unfinished:
            write_safetensors(unfinished, entries, metadata)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from None
    return out


def _weight(shards: Shards, name: str) -> Tensor:
    return shards.tensor(name).float()
