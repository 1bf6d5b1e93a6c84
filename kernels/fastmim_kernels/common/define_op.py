"""A shorter way to an op's Python functions than the dispatcher, for plain tensors on a CPU.

The dispatcher's path through a custom op costs several times the work on a small map. Where nobody watches (no
compiler, no fake tensors, no dispatch mode such as a counter), the same functions are called without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def shortcut(op: Callable, function: Callable) -> Callable:
    """Calls ``op``, or ``function``, of which it was made, where only the time differs. No autograd."""
    return lambda *args: function(*args) if unwatched(args) else op(*args)


def shortcut_with_grad(op: Callable, function: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """As :func:`shortcut` for an op with the autograd formula ``setup_context``, ``backward``."""
    # Not as a separate setup_context: torch then inspects the signature at every call, at twice the cost.
    def forward(ctx: Any, *args: Any) -> Any:
        output = function(*args)
        setup_context(ctx, args, output)
        return output

    direct = type(f"{function.__module__.rsplit('.', 1)[-1]}_direct", (torch.autograd.Function,), {
        "forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))})
    return lambda *args: direct.apply(*args) if unwatched(args) else op(*args)  # type: ignore[attr-defined]


def unwatched(args: tuple[Any, ...]) -> bool:
    """Plain CPU tensors, and nobody who wants to see the op."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    tensors = [a for a in args if isinstance(a, Tensor)]
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)


def outside_autocast(backward: Callable) -> Callable:
    """An autograd formula whose products keep their dtype where ``loss.backward()`` is called inside autocast."""
    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None, **more: Any) -> Any:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads, **more)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads, **more)

    return run
