"""Bytes of the ops whose kernels read only what the mask hides, or do not get their tensors one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmim_kernels.low_copies.op import traffic as low_copies_traffic
from fastmim_kernels.mask_tokens.op import traffic as mask_tokens_traffic

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
        grad, more, _, _, _, _, weight, pos, dtype, _ = args
        _, backward = mask_tokens_traffic(
            tuple(grad.shape),
            visible=1 - masked,
            itemsize=dtype.itemsize,
            out_itemsize=grad.element_size(),
            norm=weight is not None,
            pos=pos,
        )
        again = 0 if more is None else more.numel() * more.element_size()
        return backward[0] + again, backward[1]

    def low_copies(args: Sequence[Any]) -> tuple[int, int]:
        tensors, dtype, _ = args
        read, written, _ = low_copies_traffic(sum(t.numel() for t in tensors), dtype.itemsize)
        return read, written

    return {
        "fastmim::low_copies": low_copies,
        "fastmim::mask_tokens": mask_tokens,
        "fastmim::mask_tokens_backward": mask_tokens_backward,
    }
