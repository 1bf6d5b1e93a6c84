"""Whether a checkpoint is whole: every file, every element of every tensor, and nothing but finite numbers in them.

What a kill leaves behind is no checkpoint (:mod:`fastmim.engine.checkpoint.save`); this is about what happens to one
afterwards: a full or failing disk, a copy that was cut short, shards of two checkpoints in one folder.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastmim.engine.checkpoint.save import RNG_FILE, find_resume, list_checkpoints, read_state, step_of
from fastmim.engine.checkpoint.shards import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STEP,
    WEIGHT,
    Shards,
    is_sharded,
    require_file,
    shard_path,
)

log = logging.getLogger("fastmim")


def check_whole(folder: Path) -> dict[str, Any]:
    """Read a checkpoint through, a tensor in memory at a time, and refuse one that is damaged.

    Returns:
        Its ``state.json``.

    Raises:
        ValueError: naming the folder, and the file or tensor that is missing, unreadable, incomplete, contradicted by
            another or not finite.
    """
    try:
        state = read_state(folder)
        _check_state(state, folder)
        generators = load_file(require_file(folder / RNG_FILE))
        for key, values in generators.items():
            wanted = torch.get_rng_state().numel() if key.endswith(".cpu") else values.numel()
            if values.dtype != torch.uint8 or values.numel() != wanted:
                raise RuntimeError(f"{RNG_FILE}: {key} is no state of a random generator")
        _check_files(folder, {key.partition(".")[0] for key in generators})
        shards = Shards(folder)
        for name in shards.shapes:
            _check_runs(shards, name, WEIGHT)
        _check_moments(shards, counted=is_sharded(folder))
        for name, slot, values in shards.each():
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise RuntimeError(f"{name} ({slot}) holds numbers that are not finite")
        _check_sizes(folder, state.get("files", {}))
    except (OSError, RuntimeError, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is damaged: {_reason(error).removeprefix(f'{folder}/')}") from None
    return state


def found_checkpoint(source: str | Path) -> Path | None:
    """The checkpoint at a path, see :func:`find_resume`; None where there is none."""
    try:
        return find_resume(str(source), Path())
    except ValueError:
        return None


def open_whole(source: str | Path, use: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at a path, found whole, and the settings of its run as ``section.key``.

    Args:
        use: what takes ``{path}`` instead, where it is damaged.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    folder = found_checkpoint(source)
    if folder is None:
        raise ValueError(f"{source}: no complete checkpoint there; give a step-… folder or a run's output folder")
    try:
        return folder, check_whole(folder)["run"]
    except ValueError as error:
        raise ValueError(f"{error}; {instead_of(folder, use)}") from None


def whole_checkpoint(resume: str, root: Path, key: str = "train.resume") -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that ``key`` means (``last_whole``, or as :func:`find_resume` takes it) and its state.

    Raises:
        ValueError: there is none at that path, or it is damaged; names the newest whole one before it.
    """
    if resume == "last_whole":
        return last_whole(root)
    path = find_resume(resume, root, key)
    if path is None:
        return None, {}
    try:
        return path, check_whole(path)
    except ValueError as error:
        use = "last_whole" if path.parent == root else "{path}"
        raise ValueError(f"{error}; {instead_of(path, f'go on from it with {key}={use}')}") from None


def last_whole(root: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint under ``root`` that is whole, and its state; the newer ones are named in warnings.

    Raises:
        ValueError: there are some, all of them damaged.
    """
    found = list_checkpoints(root)
    for path in reversed(found):
        try:
            return path, check_whole(path)
        except ValueError as error:
            log.warning("%s; it is passed over", error)
    if found:
        raise ValueError(f"train.resume=last_whole: no checkpoint in {root} is whole; start over with none")
    return None, {}


def instead_of(folder: Path, use: str) -> str:
    """What to do about a damaged checkpoint: the newest whole one before it, to be taken by what ``use`` says."""
    step = step_of(folder) or 0
    for path in reversed([path for path in list_checkpoints(folder.parent) if (step_of(path) or 0) < step]):
        try:
            check_whole(path)
        except ValueError:
            continue
        return f"{path.name} before it is whole: {use.format(path=path)}"
    return "none before it is whole; use another, or start over with train.resume=none"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{Path(error.filename).name}: {(error.strerror or type(error).__name__).lower()}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_state(state: dict[str, Any], folder: Path) -> None:
    engine = state["engine"]
    numbers = {"engine.step": engine["step"], "engine.loss_sum": engine["loss_sum"], "total": state["total"]}
    for key, value in {**numbers, "engine.loss_count": engine["loss_count"]}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RuntimeError(f"state.json: {key} is {str(value)[:40]}")
    if not isinstance(state["run"], dict) or "images" not in state:
        raise RuntimeError("state.json: the settings of the run are missing")
    if step_of(folder) not in (None, engine["step"]):
        raise RuntimeError(f"state.json: it is of step {engine['step']}")


def _check_files(folder: Path, ranks: Iterable[str]) -> None:
    """One shard for each rank that had a random generator, and no other; or the two files of one process."""
    if not is_sharded(folder):
        for name in (MODEL_FILE, OPTIMIZER_FILE):
            require_file(folder / name)
        return
    wanted = {shard_path(folder, int(rank)).name for rank in ranks}
    there = {path.name for path in folder.glob("*.safetensors")} - {RNG_FILE}
    for what, names in (("is missing", wanted - there), ("belongs to another checkpoint", there - wanted)):
        if names:
            raise RuntimeError(f"{min(names)} {what}")


def _check_runs(shards: Shards, name: str, slot: str) -> None:
    """The pieces of a tensor follow each other from its first element to its last."""
    position, count = 0, math.prod(shards.shapes[name])
    for start, length in shards.runs(name, slot):
        if start != position:
            how = "is missing from" if start > position else "is stored twice from"
            raise RuntimeError(f"{name} ({slot}) {how} element {min(start, position)} on")
        position += length
    if position != count:
        raise RuntimeError(f"{name} ({slot}) has {position} elements, not {count}")


def _check_moments(shards: Shards, *, counted: bool) -> None:
    """Each parameter that the optimiser knows has all that it keeps for any, for every element.

    With ``counted`` the step may stand alone: DeepSpeed's ranks store it also for what had no gradient yet.
    """
    slots = {name: set(shards.slots(name)) - {WEIGHT} for name in shards.names()}
    every: set[str] = set().union(*slots.values())
    for name, own in slots.items():
        if name not in shards.shapes:
            raise RuntimeError(f"{name} is in the optimiser and not among the weights")
        if own not in (set(), every, {STEP} if counted else every):
            raise RuntimeError(f"{name} ({min(every - own)}) is missing")
        for slot in own:
            if slot == STEP:
                if len({float(value) for value in shards.values(name, STEP)}) != 1:
                    raise RuntimeError(f"{name} ({STEP}) differs between shards")
            elif [length for _, length in shards.runs(name, slot)] != [1]:
                _check_runs(shards, name, slot)


def _check_sizes(folder: Path, sizes: Any) -> None:
    for name, size in sizes.items():
        found = require_file(folder / Path(name).name).stat().st_size
        if found != size:
            raise RuntimeError(f"{name} has {found} bytes, and had {size} when it was written")
