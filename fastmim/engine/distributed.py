"""Ranks: joining them, what they tell each other, and leaving them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fastmim.engine.launcher import Place, find_place, meeting_point
from fastmim.engine.rank_errors import share_error
from fastmim.wording import plural

log = logging.getLogger("fastmim")


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, ``local_rank`` on its machine, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks."""
        return self.rank == 0


def world_from_env() -> World:
    """This process as :func:`fastmim.engine.launcher.find_place` reads it; without a launcher it is the only one.

    Raises:
        ValueError: the variables contradict each other, or ask for a GPU that is not there.
    """
    place = find_place()
    cuda, local_rank = torch.cuda.is_available(), place.local_rank or 0
    if cuda and place.size > 1 and place.local_rank is None:
        raise ValueError(f"WORLD_SIZE={place.size} but LOCAL_RANK is not set: which GPU is this rank's? Set it")
    if cuda and local_rank >= torch.cuda.device_count():
        there = plural(torch.cuda.device_count(), "GPU")
        raise ValueError(f"LOCAL_RANK={local_rank}: only {there} here; start fewer processes")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(rank=place.rank, size=place.size, local_rank=local_rank, device=device)


@contextmanager
def distributed(always: bool = False) -> Iterator[World]:
    """Join the process group for the duration of the block, if there is more than one process.

    A group that the caller has already initialised is used and left as it is. With ``always`` a process that
    is alone gets a group too, and the environment of a launcher: DeepSpeed needs both.
    """
    world, place = world_from_env(), find_place()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    joined = (world.size > 1 or always) and not dist.is_initialized()
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if always or joined:
        for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
            os.environ.setdefault(name, str(value))
    if joined and world.size > 1:
        _meet(backend, place)
    elif joined:
        # A store in this process: no port that another run could hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield world
        if joined:
            dist.barrier()
    except Exception as error:
        if joined and world.size > 1 and dist.is_initialized():
            share_error(error, world.rank, world.size)
        raise
    finally:
        # Also after an error, without the barrier: the other ranks may never come, and the launcher ends
        # them. The group of a process that is alone stays for its next run: DeepSpeed remembers it.
        if joined and world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str, place: Place) -> None:
    """Wait for the other ranks, where the environment or the job says."""
    os.environ.update(meeting_point(place))
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.info("rank %d of %d (%s) meets the others at %s", place.rank, place.size, place.launcher, where)
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "EADDRINUSE" in reason:
            reason = "the port is in use; set another MASTER_PORT on every rank"
        elif isinstance(error, dist.DistNetworkError) or "timed out" in reason.lower():
            reason = f"cannot be reached, or not every rank came; were all {place.size} started? ({reason[:200]})"
        raise ValueError(f"MASTER_ADDR and MASTER_PORT, {where}: {reason}") from None


def exit_process(status: int) -> NoReturn:
    """End the interpreter at once after flushing, as the last line of a program run on several ranks.

    Gloo's worker threads can abort the interpreter's shutdown after all work is done
    (pytorch/pytorch#190489): the launcher would report a failure for a run that succeeded.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # unwritable, or closed from the start
            stream.flush()
    os._exit(status)


def barrier() -> None:
    """Wait for all ranks, if there are others."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Small picklable values of all ranks, in rank order, on every rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's small picklable value, on every rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on every rank; a ``ValueError`` of it is raised on every rank.

    Raises:
        ValueError: ``work`` did.
    """
    result, refusal = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except ValueError as error:
            refusal = str(error)
    result, refusal = broadcast((result, refusal))
    if refusal is not None:
        raise ValueError(refusal)
    return result


def check_same(values: dict[str, Any]) -> None:
    """Refuse ranks that do not agree; every rank calls it.

    Args:
        values: what must be the same on every rank, by a name that tells the user what to look at.

    Raises:
        ValueError: on every rank, naming the first rank and the first value that differ from rank 0's.
    """
    first, *others = gather(values)
    for rank, theirs in enumerate(others, start=1):
        for name in [*first, *(name for name in theirs if name not in first)]:
            mine, other = first.get(name), theirs.get(name)
            if mine != other:
                raise ValueError(
                    f"{name}: {_short(other)} on rank {rank}, {_short(mine)} on rank 0; make it the same on every rank"
                )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place, without a host synchronisation."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
