"""Bytes of the ops whose kernels read only what the mask hides, or does not hide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmim_kernels.mask_tokens import traffic as mask_tokens_traffic

from .counter import ClosedForm


def closed_forms(masked: float) -> dict[str, ClosedForm]:
    """For :class:`~fastmim.plan.counter.DispatchCounter`; ``masked`` is the share of patches that is hidden."""

    def mask_tokens(args: Sequence[Any]) -> tuple[int, int]:
        x, _, _, weight, _, pos, _, out_dtype, _ = args
        forward, _ = mask_tokens_traffic(
            tuple(x.shape),
            visible=1 - masked,
            itemsize=x.element_size(),
            out_itemsize=out_dtype.itemsize,
            norm=weight is not None,
            pos=pos is not None,
        )
        return forward[0], forward[1]

    def mask_tokens_backward(args: Sequence[Any]) -> tuple[int, int]:
        grad, _, _, _, _, weight, pos, dtype, _ = args
        _, backward = mask_tokens_traffic(
            tuple(grad.shape),
            visible=1 - masked,
            itemsize=dtype.itemsize,
            out_itemsize=grad.element_size(),
            norm=weight is not None,
            pos=pos,
        )
        return backward[0], backward[1]

    return {"fastmim::mask_tokens": mask_tokens, "fastmim::mask_tokens_backward": mask_tokens_backward}
