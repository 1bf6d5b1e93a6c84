"""Checkpoints that a kill at any moment cannot damage.

A checkpoint is a folder ``checkpoints/step-00000020``: weights and optimiser moments (safetensors, in one
piece or as :mod:`fastmim.engine.checkpoint.shards`), the random generators of every rank (safetensors) and
``state.json``. It is written under another name, flushed to the disk, and renamed; so a folder with that name is
complete. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmim.engine import distributed
from fastmim.engine.base import Engine
from fastmim.engine.checkpoint.shards import require_file
from fastmim.engine.distributed import World
from fastmim.engine.rng import rng_state, seed_rank, set_rng_state
from fastmim.files import naming

log = logging.getLogger("fastmim")

FORMAT = 1
RNG_FILE = "rng.safetensors"
STATE_FILE = "state.json"
CHANGEABLE = frozenset(
    f"optim.{key}"
    for key in (
        "lr", "warmup_lr", "min_lr", "lr_batch", "clip_grad", "schedule", "warmup_epochs", "warmup_steps", "milestones",
        "milestone_steps", "decay_epochs", "decay_steps", "gamma", "cosine_after_warmup", "schedule_lag",
        "scale_min_lr", "warmup_inclusive", "weight_decay_end", "clip_each",
    )
)  # fmt: skip
"""What may change where a run goes on from a checkpoint: weights and moments mean the same under other values."""
_NAME = re.compile(r"step-(\d{8,})")


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name, or None for anything else (unfinished ones included)."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, oldest step first."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def find_resume(resume: str, root: Path, key: str = "train.resume") -> Path | None:
    """The checkpoint that ``train.resume`` means, or None to start afresh.

    Args:
        resume: ``"auto"`` (the last one under ``root``, if any), ``"none"``, or the path of a checkpoint, of
            a ``checkpoints`` folder or of a run's output folder (its last checkpoint). (``"last_whole"`` is
            :func:`fastmim.engine.checkpoint.whole.last_whole`.)
        root: the ``checkpoints`` folder of this run.
        key: the setting, for the message.

    Raises:
        ValueError: the path holds no checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        own = list_checkpoints(root)
        return own[-1] if own else None
    path = Path(resume).expanduser()
    if step_of(path) is not None and path.is_dir() and not (path / "checkpoints").is_dir():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        others = "auto, none or a step-… folder" if key == "train.resume" else "a run's folder or a step-… folder"
        raise ValueError(f"{key}={resume}: no complete checkpoint; use {others}")
    return found[-1]


def set_aside(root: Path, after_step: int) -> None:
    """Move checkpoints after ``after_step`` out of the way, into ``checkpoints.1`` (or .2, …) beside
    ``root``.

    They belong to another history than the one that now starts: resuming must never pick them up. Its
    ``metrics.jsonl`` is copied beside them, because the rows after ``after_step`` are about to be removed.
    """
    stale = [path for path in list_checkpoints(root) if (step_of(path) or 0) > after_step]
    if not stale:
        return
    metrics = root.with_name("metrics.jsonl")
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    if len(stale) == len(list_checkpoints(root)):
        # One rename: a kill leaves all of the other run's checkpoints in place, or none.
        if metrics.is_file():
            shutil.copy2(metrics, root / metrics.name)
        root.rename(aside)
    else:
        aside.mkdir()
        if metrics.is_file():
            shutil.copy2(metrics, aside / metrics.name)
        # The newest first: a kill in between must not leave a later step without those before it.
        for path in reversed(stale):
            path.rename(aside / path.name)
    count = "1 earlier checkpoint is" if len(stale) == 1 else f"{len(stale)} earlier checkpoints are"
    log.warning("%s not part of this run: moved to %s", count, aside)


def save_checkpoint(root: Path, engine: Engine, extra: Mapping[str, Any], *, keep: int, world: World) -> Path:
    """Write a checkpoint of the current step; every rank calls it.

    Args:
        root: the ``checkpoints`` folder.
        engine: its ``state()["step"]`` names the folder.
        extra: JSON values to store beside (configuration, position).
        keep: how many of the newest checkpoints stay, at least 1.
        world: this process; rank 0 writes, and the others their shards if the engine is sharded. The folder
            must then be one that all of them see.

    Returns:
        The folder. One that is already there is left as it is: :func:`set_aside` has made sure that it holds
        the same step of the same run.

    Raises:
        OSError: it cannot be written; those before it are as they were.
    """
    state = {"format": FORMAT, **extra, "engine": engine.state()}
    final = root / f"step-{state['engine']['step']:08d}"
    rng = distributed.gather(rng_state(world.device))
    if distributed.broadcast(final.exists()):
        return final
    partial = root / f".partial-{final.name}"
    with _saving(partial, alone=world.size == 1):
        if world.is_main:
            root.mkdir(parents=True, exist_ok=True)
            clean_unfinished(root)
            partial.mkdir()
        distributed.barrier()
        if world.is_main or engine.sharded:
            engine.save(partial)
        distributed.barrier()
        if world.is_main:
            _complete(root, partial, final, state, rng)
    if world.is_main:
        _prune(root, keep)
    distributed.barrier()
    return final


@contextmanager
def _saving(partial: Path, *, alone: bool) -> Iterator[None]:
    """Around the files of a checkpoint; where they cannot be written, says what there is, and gives the room back.

    (Not beside other ranks, which may still write there: the next start does it.)
    """
    try:
        with naming(partial):
            try:
                yield
            except SafetensorError as error:
                raise _system_error(error) from None
    except OSError as error:
        last = [path.name for path in list_checkpoints(partial.parent)[-1:]]
        kept = f"{last[0]} is the last checkpoint" if last else "there is no checkpoint yet"
        raise OSError(error.errno, f"{error.strerror or error}; {kept}", error.filename) from None
    finally:
        if alone:
            shutil.rmtree(partial, ignore_errors=True)


def _system_error(error: SafetensorError) -> Exception:
    """The library tells of a full disk by an exception of its own."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else error


def _complete(root: Path, partial: Path, final: Path, state: dict[str, Any], rng: list[dict[str, Tensor]]) -> None:
    generators = {f"{rank}.{kind}": one for rank, states in enumerate(rng) for kind, one in states.items()}
    save_file(generators, partial / RNG_FILE)
    # What was written, for whoever wants to know later whether all of it is still there.
    state["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        _flush(path)
    _flush(partial)
    partial.rename(final)
    _flush(root)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_unfinished(root: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for path in [*root.glob(".partial-*"), *root.glob(".deleted-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path, keep: int) -> None:
    for path in list_checkpoints(root)[: -max(keep, 1)]:
        # Renamed first: a kill during the deletion must not leave a damaged folder under a complete name.
        shutil.rmtree(path.rename(root / f".deleted-{path.name}"), ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        ValueError: unreadable, or written by another format.
    """
    try:
        state = json.loads(require_file(path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError) as error:  # a tree too deep for the parser is a RuntimeError
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        reason = reason.replace(f"{STATE_FILE} is", "it is")
        raise ValueError(f"{path / STATE_FILE} cannot be read: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise ValueError(f"{path / STATE_FILE} has format {str(found)[:40]}, not {FORMAT}")
    return state


def load_checkpoint(path: Path, engine: Engine, *, world: World, seed: int) -> dict[str, Any]:
    """Restore engine and random generators from a checkpoint; every rank calls it.

    A rank that the checkpoint does not know (more processes than before) gets generators derived from
    ``seed``, its rank and the step.

    Returns:
        The stored ``state.json``.

    Raises:
        ValueError: damaged, or its tensors do not fit this model.
    """
    try:
        state = read_state(path)
        engine.load(path)
        rng = load_file(require_file(path / RNG_FILE))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"train.resume: cannot load {path}: {text}") from None
    engine.load_state(state["engine"])
    prefix = f"{world.rank}."
    mine = {key.removeprefix(prefix): tensor for key, tensor in rng.items() if key.startswith(prefix)}
    if world.device.type in mine:
        set_rng_state(mine, world.device)
    else:
        log.info("rank %d was not in %s: its dropout starts from a new seed", world.rank, path)
        seed_rank(seed + state["engine"]["step"], world.rank)
    return state


def check_same_run(
    stored: Mapping[str, Any], current: Mapping[str, Any], path: Path, *, allow: bool = False
) -> dict[str, list[Any]]:
    """Refuse to continue a run with settings that would make it another run.

    Args:
        stored: flat settings (``"model.name": …``) of the checkpoint.
        current: those of this run.
        path: the checkpoint, for the message.
        allow: those of :data:`CHANGEABLE` may differ.

    Returns:
        [stored, current] of each that does, by its key.

    Raises:
        ValueError: naming every setting that differs, with both values, and those that may never change.
    """
    changes = {
        key: [stored.get(key), current.get(key)]
        for key in {**stored, **current}
        if stored.get(key) != current.get(key)
    }
    fixed = [key for key in changes if key not in CHANGEABLE]
    if fixed:
        raise ValueError(
            f"{_listed(changes)}: {path} is another run: {', '.join(fixed)} may never change (rates, optim.clip_grad "
            "and the schedule may, with train.resume_changes=allow); restore these settings, choose another "
            "output.dir, or start over with train.resume=none"
        )
    if changes and not allow:
        raise ValueError(
            f"{_listed(changes)}: {path} is another run; let them change from there on with "
            "train.resume_changes=allow, restore them, choose another output.dir, or start over with train.resume=none"
        )
    return changes


def _listed(changes: Mapping[str, list[Any]]) -> str:
    return "; ".join(f"{key}={_shown(new)} (checkpoint: {_shown(old)})" for key, (old, new) in changes.items())


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)[:80]
