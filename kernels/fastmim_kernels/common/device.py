"""Kernels run where their tensors are, whichever device is current; and what a launch asks of a device.

Triton launches on the current device and stream. Every way into an op makes that of its tensors current, once for all
that it launches (:func:`.direct.as_given`); a launcher need not ask, and nobody else calls one. It calls
``kernel.run(…, grid=grid, warmup=False)``, as ``kernel[grid](…)`` would after it has packed all arguments once more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HERE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def processors(device: torch.device, elsewhere: int = 1) -> int:
    """Multiprocessors of a GPU; ``elsewhere`` in the interpreter."""
    return _ask(torch.cuda.get_device_properties, device).multi_processor_count if device.type == "cuda" else elsewhere


def sm_of(device: torch.device) -> int:
    """80, 90, 100, … of a GPU; 90 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = _ask(torch.cuda.get_device_capability, device)
    return 10 * major + minor


H100 = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="H100")
"""Properties by which launchers choose where a trace stands for a GPU and none is at hand."""


def on_fake_cuda(x: Tensor) -> Tensor:
    """The same fake tensor, on a GPU, with its strides: bodies of ops choose by device and copy by strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")


@functools.lru_cache(maxsize=64)
def _ask(question: Callable[[torch.device], Any], device: torch.device) -> Any:
    """The answer is kept: torch takes microseconds for one. With the question, so that a stand-in's stays its own."""
    return question(device)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which the device of ``x`` is current; :data:`HERE`, which does nothing, where that is so already."""
    # Tensors that are fake name a device that may not be there.
    if not x.is_cuda or not torch.cuda.is_initialized() or x.get_device() == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(x.device)
