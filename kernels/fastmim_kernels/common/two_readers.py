"""An op that also hands its input on, to the input's other reader.

Where a tensor has two readers, autograd adds their gradients in a pass of its own. When the second reader takes
the input from the first, the gradient of the second is there when the first computes its own, and is added to it
in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def and_input(op: Callable, setup_context: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of the arguments of ``op`` that returns (first output of ``op``, first argument).

    Args:
        op: Returns a tuple.
        setup_context, backward: Its autograd formula; the latter takes ``add=``, the gradient of the second result.
    """
    def forward(ctx: Any, *args: Any) -> Any:
        outputs = op(*args)
        setup_context(ctx, args, outputs)
        return *outputs, args[0].detach()

    def add_gradients(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads[:-1], add=grads[-1])

    function = type("and_input", (torch.autograd.Function,), {
        "forward": staticmethod(forward), "backward": staticmethod(once_differentiable(add_gradients))})

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # the compiler sees the op itself, and adds the gradients
            return op(*args)[0], args[0]
        first, *_, handed_on = function.apply(*args)  # type: ignore[attr-defined]
        return first, handed_on

    return run
