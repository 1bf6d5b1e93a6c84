"""Triton's launches, told instead of done: without a GPU, as on an H100 by size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastmim_kernels.common.device import H100


@contextlib.contextmanager
def counted_by(count: Callable[[str, Any, int, float], None]) -> Iterator[None]:
    """Triton kernels call ``count(name, arguments, FLOPs, instructions)`` instead; the device is an H100 by size."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        from fastmim_kernels.check import issue_slots
        from fastmim_kernels.common import arrival
        from fastmim_kernels.low_copies import on_triton as low_copies
    except ModuleNotFoundError:
        yield
        return

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        issued = issue_slots.launched(self, grid, named) or 0.0
        count(self.fn.__name__, (args, kwargs), _stated_flops(self, grid, named), issued)

    def zeros(count: int, device: torch.device) -> Tensor:
        # They stay from launch to launch, so a step neither makes nor clears them.
        return torch.empty(count, dtype=torch.int32, device=device)

    def table(tensors: Any) -> Tensor:
        # So does this one, as long as parameters keep their places.
        return torch.empty(1, 3, dtype=torch.int64, device="cuda:0")

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(arrival, "counters", zeros),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: H100),
        mock.patch.object(low_copies, "table", table),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
    ):
        yield


def _stated_flops(kernel: Any, grid: Any, named: dict[str, Any]) -> int:
    """What the kernel's ``launch_metadata`` says, which profilers read too; 0 without."""
    # An interpreted function keeps its options in a dictionary.
    metadata = getattr(kernel, "launch_metadata", None) or getattr(kernel, "kwargs", {}).get("launch_metadata")
    if metadata is None:
        return 0
    return int(metadata(grid, SimpleNamespace(name=kernel.fn.__name__), named).get("flops", 0))
