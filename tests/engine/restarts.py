"""A run that goes on from an earlier checkpoint beside the run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastmim.engine.metrics import read_rows

_OF_THE_MACHINE = {"images_per_sec", "step_time", "data_time", "peak_memory_gib"}


def told(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without what the machine had a part in."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in _OF_THE_MACHINE} for row in rows]


def cut(folder: Path, copy: Path, step: int) -> None:
    """Copy a run without its checkpoint of ``step``: what a kill before it would have left."""
    shutil.copytree(folder, copy)
    shutil.rmtree(_checkpoint(copy, step))


def check_same(found: Path, expected: Path, step: int) -> None:
    """Both runs tell the same, and their checkpoints of ``step`` are bit-identical."""
    assert told(found) == told(expected)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(_checkpoint(folder, step) / name) for folder in (found, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items()), name


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"
