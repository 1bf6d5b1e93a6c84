"""Kernels run where their tensors are, whichever device is current."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_HERE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which the device of ``x`` is current; it costs nothing where that is so already."""
    device = x.device
    # Tensors that are fake name a device that may not be there.
    if device.type != "cuda" or not torch.cuda.is_initialized() or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def on_own_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """``launcher`` with the device of its first tensor current: Triton launches on the current device and stream.

    To be put on every function that launches kernels, or asks for the current stream; those that only such
    functions call need it not.
    """
    @functools.wraps(launcher)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for x in args:
            if isinstance(x, Tensor):
                with on_device_of(x):
                    return launcher(*args, **kwargs)
        raise TypeError(f"{launcher.__name__} takes a tensor by position")

    return run
