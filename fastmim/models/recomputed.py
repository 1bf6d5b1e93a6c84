"""A part of the forward pass that the backward pass repeats as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

_INSIDE = ContextVar("inside a part that is repeated as a whole", default=False)


def inside_repeated() -> bool:
    """Whether this is computed by :func:`repeated`: what lies in it need not be recomputed by itself."""
    return _INSIDE.get()


def repeated(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``run(x)``, whose activations are not kept: the backward pass runs it again, in the same random state.

    torch's non-reentrant checkpointing: one graph and one gradient of every weight, as DDP and ZeRO expect.
    """

    @functools.wraps(run)
    def marked(x: Tensor) -> Tensor:
        token = _INSIDE.set(True)
        try:
            return run(x)
        finally:
            _INSIDE.reset(token)

    # Without the early stop a repetition ends as a forward pass does: ZeRO-3's hooks come in pairs.
    with set_checkpoint_early_stop(False):
        out: Tensor = checkpoint(marked, x, use_reentrant=False)
    return out
