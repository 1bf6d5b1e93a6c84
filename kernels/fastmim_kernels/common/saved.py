"""What autograd keeps between an op's passes, in the layout in which the op made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keep them for the backward pass of a node, which is asked for no gradient of zeros."""
    ctx.set_materialize_grads(False)  # else a launch fills zeros for a result that nobody reads
    ctx.save_for_backward(*tensors)
    # Who keeps them by hooks may give them back in another layout, which a kernel that wrote them does not expect.
    hooked = not is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ctx.whole = tuple(t is not None and t.is_contiguous() for t in tensors) if hooked else ()


def saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """The tensors, contiguous those that were; to be read once, as checkpointing gives them out a single time."""
    tensors: tuple[Tensor | None, ...] = ctx.saved_tensors
    if not ctx.whole:
        return tensors
    return tuple(t if t is None or not whole else t.contiguous() for t, whole in zip(tensors, ctx.whole, strict=True))
