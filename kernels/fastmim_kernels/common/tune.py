"""Ways to compute the same thing: which one is taken, by a measurement at first use on a GPU, kept on disk.

The file is one of the user's cache, for a GPU and the versions of torch and Triton. ``FASTMIM_TUNE=0`` measures
nothing and reads nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .user_cache import cache_file, read_cache, write_cache

REPEATS = 5
_chosen: dict[tuple[Any, ...], str] = {}
_files: dict[Path, dict[str, str]] = {}


Ways = Callable[[], Mapping[str, Callable[[], Any]]]


def choose(key: tuple[Any, ...], device: torch.device, ways: Ways, otherwise: str) -> str:
    """The name of the way to take.

    Args:
        key: Of the task, without the device: a name, and whatever the choice depends on.
        device: Where it is computed; it is current.
        ways: Makes a function of each way, which does the task on what is at hand; its result is dropped.
        otherwise: The answer where nothing can be measured: without a GPU, in a trace, in a capture. It is also the
            way that the others must agree with.
    """
    found = _chosen.get((*key, device))
    if found is not None:
        return found
    if device.type != "cuda" or not _measurable():
        return otherwise
    path, text, known = _file(device), json.dumps([str(part) for part in key]), ways()
    kept = _read(path)
    found = kept.get(text)
    if found is None or found not in known:
        found, lasting = _fastest(known, otherwise)
        if lasting:
            kept[text] = found
            with suppress(OSError):  # a cache: without it the next process measures again
                write_cache(path, kept)
    # Also where it does not last: with another answer at a later call the steps of a run would have other bits.
    _chosen[(*key, device)] = found
    return found


def forget() -> None:
    """Read the files again."""
    _chosen.clear()
    _files.clear()


def _measurable() -> bool:
    return (os.environ.get("FASTMIM_TUNE") != "0" and torch.cuda.is_initialized() and not is_in_torch_dispatch_mode()
            and not torch.cuda.is_current_stream_capturing())


def _fastest(ways: Mapping[str, Callable[[], Any]], otherwise: str) -> tuple[str, bool]:
    """The way that is measured to be the fastest, and whether another process may rely on that.

    Not where it lies at this moment: values that are no numbers, as gradients of a scaled loss may be at first, agree
    with nothing, and a way may need more memory than is left beside the step, or not run at all.
    """
    first, times, lasting = ways[otherwise], {}, True
    try:
        if not _finite(first()):
            return otherwise, False
        times[otherwise] = milliseconds(first)
    except torch.OutOfMemoryError:
        return otherwise, False
    for name, way in ways.items():
        try:
            if way is not first and _agree(way(), first()):
                times[name] = milliseconds(way)
        except Exception:  # a compiler's are of many types, and there is a way that has run
            lasting = False
    return min(times, key=times.__getitem__), lasting


def _finite(found: Any) -> bool:
    return all(math.isfinite(float(x.float().norm())) for x in (found if isinstance(found, tuple) else (found,)))


def _agree(found: Any, expected: Any) -> bool:
    """Whether the results differ by roundings only: a way that is wrong must not win by being fast."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
    return all(float((a.float() - b.float()).norm()) <= 8 * torch.finfo(b.dtype).eps * float(b.float().norm())
               for a, b in pairs)


def milliseconds(way: Callable[[], Any]) -> float:
    """Median of :data:`REPEATS`, after one that compiles; what is queued before keeps the GPU at its clock."""
    way()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        way()
        event.record()
    events[-1].synchronize()
    return median(begin.elapsed_time(end) for begin, end in zip(events, events[1:], strict=False))


def _file(device: torch.device) -> Path:
    import triton

    versions = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__}"
    name = "".join(c if c.isalnum() or c in ".+" else "-" for c in versions)
    return cache_file(f"tuned-{name}.json")


def _read(path: Path) -> dict[str, str]:
    if path not in _files:
        found = read_cache(path)
        pairs = found.items() if isinstance(found, dict) else ()
        _files[path] = {key: name for key, name in pairs if isinstance(name, str)}
    return _files[path]
