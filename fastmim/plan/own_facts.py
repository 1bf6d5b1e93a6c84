"""The facts that :mod:`.own` asks for: images looked at by their headers, and what this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastmim.data.decode import DecodeError, decode_image
from fastmim.data.held_out import places
from fastmim.data.index import ImageIndex
from fastmim.data.plugins import open_image
from fastmim.data.survey import LOOKED_AT

from .hardware import GIB, GPUS, MEASURED, Gpu
from .own_terms import Facts

HASHED = 100_000
"""Up to so many images every name is hashed to know how many a share holds out."""
UNKNOWN_MEMORY = 4 * GIB
"""Where the system does not say what is free."""
UNKNOWN_FLOPS = 20e12
"""Of a GPU that is not in the planner's table."""
_GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


class Head(NamedTuple):
    """What the header of an image says; sizes in pixels."""

    height: int
    width: int
    is_grey: bool
    has_alpha: bool


def look(index: ImageIndex, most: int = LOOKED_AT, bands: Mapping[str, Any] | None = None) -> list[Head]:
    """The headers of up to ``most`` images spread over an index; those that cannot be read are left out.

    ``bands``: arguments of :func:`~fastmim.data.decode.decode_image` for samples that are taken as stored; those images
    are decoded, because their kinds of headers are many.
    """
    chosen = np.linspace(0, len(index) - 1, min(most, len(index))).astype(int).tolist()
    heads = (_head(index, i) if bands is None else _decoded(index, i, bands) for i in chosen)
    return [head for head in heads if head is not None]


def _decoded(index: ImageIndex, number: int, bands: Mapping[str, Any]) -> Head | None:
    try:
        image = decode_image(index.read(number), **bands)
    except DecodeError:
        return None
    return Head(image.shape[1], image.shape[2], False, False)


def _head(index: ImageIndex, number: int) -> Head | None:
    try:
        image = open_image(index.read(number))
    except (DecodeError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return None  # the run itself names it
    has_alpha = image.mode in _ALPHA or "transparency" in image.info
    return Head(image.height, image.width, image.mode in _GREY, has_alpha)


def gather(
    index: ImageIndex, *, gpu: Gpu | None = None, ranks: int = 1, local_ranks: int = 1,
    bands: Mapping[str, Any] | None = None,
) -> Facts:  # fmt: skip
    """The facts about a set of images and this machine, or a machine with ``gpu``.

    Args:
        gpu: plan for this one; None: the GPU that is here, or the CPU.
        ranks: processes of the run.
        local_ranks: those of them that share this machine.
        bands: see :func:`look`.

    Raises:
        ValueError: none of the images looked at can be read.
    """
    heads = look(index, bands=bands)
    if not heads:
        raise ValueError(f"--images {index.root}: none of the images looked at can be read; run `fastmim data check`")
    name, memory, flops = _here() if gpu is None else (gpu.name, gpu.memory * GIB, gpu.flops)
    return Facts(
        images=len(index),
        short_sides=tuple(sorted(min(head.height, head.width) for head in heads)),
        pixels=sorted(head.height * head.width for head in heads)[len(heads) // 2],
        grey=all(head.is_grey for head in heads),
        transparent=sum(head.has_alpha for head in heads),
        places=tuple(np.sort(places(index)).tolist()) if len(index) <= HASHED else (),
        cores=max(1, usable_cores() // local_ranks),
        memory=available_memory() / local_ranks,
        gpu=name,
        gpu_memory=memory,
        gpu_flops=flops,
        ranks=ranks,
    )


def _here() -> tuple[str, float, float]:
    """(name, bytes that are free, FLOP/s) of the GPU that trains; an empty name without one."""
    if not torch.cuda.is_available():
        return "", 0.0, 0.0
    name = torch.cuda.get_device_name()
    chip = name.upper().replace(" ", "")
    known = [gpu for gpu in (*MEASURED, *GPUS.values()) if gpu.name.split("-")[0].upper() in chip]
    return name, float(torch.cuda.mem_get_info()[0]), known[0].flops if known else UNKNOWN_FLOPS


def usable_cores() -> int:
    """Cores that torch would use, and this process and its cgroup may."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [int(quota) // int(period) for quota, period in _quotas()]
    return max(1, min([allowed, torch.get_num_threads(), *quotas]))


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still take: what the system has free, or its cgroup where that is less.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    free = list(_cgroup_free(root))
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024.0)
    if not free:
        with suppress(ValueError, OSError, AttributeError):  # macOS: no more is known than how much there is
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2.0)
    return min(free, default=UNKNOWN_MEMORY)


def _cgroup_free(root: Path) -> Iterator[float]:
    """Of every cgroup around this process that has a limit; page cache that can be dropped counts as free."""
    for folder, limit, used, cache in _cgroups(root):
        with suppress(OSError, ValueError):
            most = (folder / limit).read_text().strip()
            if most != "max":
                held = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0.0, int(most) - int((folder / used).read_text()) + float(held.get(cache, 0)))


def _cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    names = {"": ("memory.max", "memory.current", "inactive_file")}
    names["memory"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            controllers, path = line.split(":", 2)[1:]
            kind = "memory" if "memory" in controllers.split(",") else controllers
            if kind in names:
                top = root / "sys/fs/cgroup" / kind
                inner = top / path.lstrip("/")
                # In a container the path may be that of the host; the limit then stands at the top.
                for folder in [inner, *(one for one in inner.parents if one.is_relative_to(top))]:
                    yield (folder, *names[kind])


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[str, str]]:
    with suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        if quota != "max":
            yield quota, period
