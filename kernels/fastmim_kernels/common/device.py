"""Kernels run where their tensors are, whichever device is current; and what a launch asks of a device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_HERE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


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
    """A context in which the device of ``x`` is current; it costs nothing where that is so already."""
    # Tensors that are fake name a device that may not be there.
    if not x.is_cuda or not torch.cuda.is_initialized() or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def on_own_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """``launcher`` with the device of its first tensor current: Triton launches on the current device and stream.

    To be put on every function that launches kernels, or asks for the current stream; those that only such
    functions call need it not.
    """
    @functools.wraps(launcher)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0] if isinstance(args[0], Tensor) else next((t for t in args if isinstance(t, Tensor)), None)
        if x is None:
            raise TypeError(f"{launcher.__name__} takes a tensor by position")
        if not x.is_cuda or (there := on_device_of(x)) is _HERE:
            return launcher(*args, **kwargs)
        with there:
            return launcher(*args, **kwargs)

    return run
