"""Who may go past torch's dispatcher: plain tensors that nobody watches, outside autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .device import HERE, on_device_of

_LOW, _WIDE = (torch.bfloat16, torch.float16), torch.float32
_CPU = -1
"""What ``Tensor.get_device`` says of a CPU, and of some devices that are none."""


class Plain(NamedTuple):
    """What a choice of implementations asks of plain tensors."""

    like: Tensor
    """The first of them."""
    dtype: torch.dtype
    """As :func:`dtype_of`."""
    double: bool
    """One of them is float64."""


def unwatched(args: Sequence[Any]) -> bool:
    """Plain tensors, and nobody who wants to see the op: no compiler, no fakes, no dispatch mode."""
    return not is_compiling() and not is_in_torch_dispatch_mode() and plain(args) is not None


def plain_to_all(args: Sequence[Any]) -> Plain | None:
    """:func:`plain` where nobody looks into the op: no compiler, dispatch mode, torch.func, jit.trace."""
    if (is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None):
        return None
    return plain(args)


def plain(args: Sequence[Any]) -> Plain | None:
    """Of the tensors among ``args``, or None unless all are on a CPU, or on one GPU, and of no subclass.

    All in one walk, which every call makes.
    """
    like, place, low, double = None, _CPU, _WIDE, False
    for arg in args:
        if arg is None:
            continue
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if like is None:
                if not (arg.is_cuda or arg.is_cpu):
                    return None
                like, place = arg, arg.get_device()
            elif arg.get_device() != place or place == _CPU and not arg.is_cpu:
                return None
            dtype = arg.dtype
        elif kind is torch.dtype:
            dtype = arg
        elif isinstance(arg, Tensor):
            return None
        elif (kind is list or kind is tuple) and arg and isinstance(arg[0], Tensor):
            if (found := plain(arg)) is None:
                return None
            if like is None:
                like, place = found.like, found.like.get_device()
            elif found.like.get_device() != place:
                return None
            dtype = torch.float64 if found.double else _WIDE
        else:
            continue
        if dtype is not _WIDE:
            double = double or dtype is torch.float64
            if low is _WIDE and dtype in _LOW:
                low = dtype
    return None if like is None else Plain(like, low, double)


def as_given(like: Tensor, function: Callable, *args: Any) -> Any:
    """``function(*args)`` outside autocast, with the dtypes that it is given; the device of ``like`` is current."""
    device = "cpu"
    if like.is_cuda:
        if not is_compiling() and (there := on_device_of(like)) is not HERE:
            with there:
                return as_given(like, function, *args)
        device = "cuda"
    elif not like.is_cpu:
        device = like.device.type
    if not torch.is_autocast_enabled(device):
        return function(*args)
    if is_compiling():
        with torch.autocast(device, enabled=False):
            return function(*args)
    # The context costs as much as an op; what it does beyond this is for casts within it, of which there are none.
    torch.set_autocast_enabled(device, False)
    try:
        return function(*args)
    finally:
        torch.set_autocast_enabled(device, True)


def check_whole(tensors: Sequence[Tensor]) -> None:
    """Raise ``RuntimeError`` for parameters that FSDP2 has left spread among the ranks."""
    if any(hasattr(t, "placements") for t in tensors):
        raise RuntimeError("a parameter is spread among the ranks (DTensor) where it is read; fully_shard() the model "
                           "as a whole, not its blocks, some parameters of which are read for all at once; or train "
                           "with efficiency.zero_stage=3")


def dtype_of(args: Sequence[Any]) -> torch.dtype:
    """In which an op of these arguments computes: the low precision among tensors and dtypes, float32 without one."""
    for arg in args:
        if (arg.dtype if isinstance(arg, Tensor) else arg) in _LOW:
            return arg.dtype if isinstance(arg, Tensor) else arg
    return torch.float32


def tensors_of(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif type(arg) in (list, tuple):
            found += [t for t in arg if isinstance(t, Tensor)]
    return found
