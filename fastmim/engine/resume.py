"""Where a run begins: afresh, from its own last checkpoint, or as a branch of another run."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastmim.engine import distributed
from fastmim.engine.base import Engine
from fastmim.engine.checkpoint import check_same_run, load_checkpoint, set_aside, whole_checkpoint
from fastmim.engine.distributed import World
from fastmim.engine.metrics import read_rows
from fastmim.files import write_text
from fastmim.objectives.schedule import Schedule
from fastmim.wording import plural

log = logging.getLogger("fastmim")


class Found(NamedTuple):
    """A checkpoint, its ``state.json``, and whether it is another run's, to branch from; None: start afresh."""

    path: Path | None
    state: dict[str, Any]
    branch: bool = False


def find_start(resume: str, branch_from: str | None, root: Path, world: World) -> Found:
    """The checkpoint that a run goes on from, read through by rank 0 and found whole; every rank calls it.

    A branch that has checkpoints of its own goes on from them.

    Args:
        resume, branch_from: of the ``train`` section.
        root: the ``checkpoints`` folder of this run.
        world: this process.

    Raises:
        ValueError: there is none at that path, or it is damaged; names the newest whole one before it.
    """
    return distributed.on_main(lambda: _find(resume, branch_from, root))


def _find(resume: str, branch_from: str | None, root: Path) -> Found:
    if branch_from is not None and resume not in ("auto", "none", "last_whole"):
        raise ValueError(f"train.resume={resume}: beside train.branch_from={branch_from}; give one of them")
    if branch_from is not None and _is_of(Path(branch_from).resolve(), root.resolve()):
        raise ValueError(f"output.dir={root.parent}: it is the run to branch from; choose a new output.dir")
    path, state = whole_checkpoint(resume, root)
    if path is not None and branch_from is not None and not state.get("branch"):
        raise ValueError(
            f"output.dir={root.parent}: it has a run that is no branch, which train.branch_from={branch_from} would "
            "not change; choose a new output.dir"
        )
    if path is not None or branch_from is None:
        return Found(path, state)
    path, state = whole_checkpoint(branch_from, root, key="train.branch_from")
    return Found(path, state, branch=True)


def _is_of(path: Path, root: Path) -> bool:
    """Whether ``path`` is the run whose ``checkpoints`` folder is ``root``, or a checkpoint of it."""
    return path in (root, root.parent) or path.parent == root


def check_schedule(state: dict[str, Any], now: Schedule, path: Path) -> str | None:
    """How the learning rates of the steps to come differ from what the checkpoint's run would have used, or None."""
    start, total = int(state["engine"]["step"]), now.total_steps
    then = _schedule_of(state, now)
    step = next((k for k in range(start, total) if not _same(now(k), then(k))), None)
    if step is None:
        return None
    same_length = then.total_steps == total
    what = "the schedule differs" if same_length else f"train.steps={total} (checkpoint: {then.total_steps})"
    if step == start:
        last = then(max(step - 1, 0))
        return f"{what}: the learning rate would jump from {last:.3g} to {now(step):.3g} at step {step}"
    return f"{what}: the learning rate would be {now(step):.3g} instead of {then(step):.3g} from step {step} on"


def _schedule_of(state: dict[str, Any], now: Schedule) -> Schedule:
    """The schedule that a checkpoint was trained with; one that has not noted it has had this run's settings."""
    known = {field.name for field in dataclasses.fields(Schedule)}
    noted = {key: value for key, value in state.get("schedule", {}).items() if key in known}
    return Schedule(**noted) if noted else dataclasses.replace(now, total_steps=state["total"])


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * max(abs(one), abs(other))


def go_on(
    found: Found,
    engine: Engine,
    world: World,
    stored: dict[str, Any],
    schedule: Schedule,
    *,
    folder: Path,
    allow: bool,
    seed: int,
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    write: Callable[[], None],
) -> int:
    """Load what was found, and return the steps already done; every rank calls it.

    What has changed since, in this resumption and in earlier ones, is noted in ``stored["changes"]``, and what a branch
    has come from in ``stored["branch"]``.

    Args:
        found: of :func:`find_start`.
        engine, world: that train.
        stored: what every checkpoint of this run will hold.
        schedule: learning rates of this run.
        folder: ``output.dir``.
        allow: rates and schedule may change where a run goes on; a branch may always.
        seed: of ranks that the checkpoint does not know.
        complete: adds to a checkpoint's settings what its version has not noted.
        write: keeps the config; rank 0 calls it once nothing can be refused any more.

    Raises:
        ValueError: the checkpoint belongs to another run, or is further than this run goes; or the schedule has
            changed.
    """
    root, start = folder / "checkpoints", 0
    if found.path is not None:
        start = found.state["engine"]["step"]
        _note_changes(found, stored, schedule, allow=allow or found.branch, complete=complete)
        load_checkpoint(found.path, engine, world=world, seed=seed)
        log.info("%s %s", "branching from" if found.branch else "resuming from", found.path)
    distributed.barrier()
    if world.is_main:
        own = found.path is not None and found.path.resolve().parent == root.resolve()
        set_aside(root, after_step=start if own else -1)
        if found.branch and found.path is not None:
            _take_rows(found.path, folder, start)
        write()
    distributed.barrier()
    return start


def _note_changes(
    found: Found, stored: dict[str, Any], schedule: Schedule, *, allow: bool, complete: Callable[..., dict[str, Any]]
) -> None:
    path, state = found.path, found.state
    assert path is not None
    start, total = state["engine"]["step"], stored["total"]
    changes = check_same_run(complete(state["run"]), stored["run"], path, allow=allow)
    if start > total:
        raise ValueError(f"train.steps={total}: {path} is at step {start} already; raise it")
    other_rates = check_schedule(state, schedule, path)
    if other_rates and not allow:
        raise ValueError(
            f"{other_rates}; take that with train.resume_changes=allow, branch from it with "
            f"train.branch_from={path} and a new output.dir, or restore the length"
        )
    if other_rates:
        log.warning("%s", other_rates.replace("would jump", "jumps").replace("would be", "will be"))
    if state["total"] != total:
        log.warning("the run was %s long and is %d now", plural(state["total"], "step"), total)
        changes["train.steps"] = [state["total"], total]
    stored["changes"] = state.get("changes", []) + ([{"step": start, **changes}] if changes else [])
    branch = {"from": str(path.resolve()), "step": start} if found.branch else state.get("branch")
    if branch:
        stored["branch"] = branch
    for key, (old, new) in changes.items():
        log.info("from step %d on %s=%s (before: %s)", start, key, new, old)
    if state["images"] != stored["images"]:
        log.warning("the list of image files has changed since %s was written", path)


def _take_rows(checkpoint: Path, folder: Path, start: int) -> None:
    """The rows of the run up to a branch are the branch's too."""
    rows = [row for row in read_rows(checkpoint.parent.parent / "metrics.jsonl") if row["step"] <= start]
    if rows:
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
