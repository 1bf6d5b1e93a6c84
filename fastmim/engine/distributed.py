"""Ranks: read from the environment that torchrun, deepspeed or nobody has set."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist


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


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"{name}={text!r}: not a whole number; unset it or use the launcher") from None


def world_from_env() -> World:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; without them this is the only process.

    Raises:
        ValueError: the variables contradict each other.
    """
    size = _env_int("WORLD_SIZE", 1)
    rank = _env_int("RANK", 0)
    local_rank = _env_int("LOCAL_RANK", 0)
    if size > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={size} but RANK is not set; start with torchrun or deepspeed")
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank}: outside 0..{size - 1} given by WORLD_SIZE={size}")
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK={local_rank}: only {torch.cuda.device_count()} GPUs here; start fewer processes")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


@contextmanager
def distributed(always: bool = False) -> Iterator[World]:
    """Join the process group for the duration of the block, if there is more than one process.

    A group that the caller has already initialised is used and left as it is. With ``always`` a process that
    is alone gets a group too, and the environment of a launcher: DeepSpeed needs both.
    """
    world = world_from_env()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    joined = (world.size > 1 or always) and not dist.is_initialized()
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if always:
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
            os.environ.setdefault(name, str(value))
    if joined and world.size > 1:
        dist.init_process_group(backend)
    elif joined:
        # A store in this process: no port that another run could hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield world
        if joined:
            dist.barrier()
    finally:
        # Also after an error, without the barrier: the other ranks may never come, and the launcher ends
        # them. The group of a process that is alone stays for its next run: DeepSpeed remembers it.
        if joined and world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """End the interpreter at once after flushing, as the last line of a program run on several ranks.

    Gloo's worker threads can abort the interpreter's shutdown after all work is done
    (pytorch/pytorch#190489): the launcher would report a failure for a run that succeeded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
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


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place, without a host synchronisation."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
