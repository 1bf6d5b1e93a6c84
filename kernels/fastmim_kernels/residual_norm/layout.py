"""Which results and gradients of ``residual_norm`` are tensors of their own, and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def given(residual: Tensor | None, branch: Tensor | None) -> Tensor:
    """The one that is there."""
    like = residual if branch is None else branch
    assert like is not None
    return like


def written(order: str, branch: Tensor | None, stream_dtype: torch.dtype, out_dtype: torch.dtype
            ) -> tuple[bool, bool]:
    """Whether the two results are tensors of their own, or equal to the residual and to the first result."""
    return branch is not None, order == "pre" or out_dtype != stream_dtype


def merged_shape(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1] // 2, x.shape[2] // 2, 4 * x.shape[3]


def owned(order: str, merge: bool, grad_out: Tensor | None, drop_scale: Tensor | None, gamma: Tensor | None,
          dtype: torch.dtype | None, branch_dtype: torch.dtype | None) -> tuple[bool, bool]:
    """Whether d residual and d branch are tensors of their own.

    Otherwise the first equals grad_added, the second d residual, or there is no such input.
    """
    post = order == "post"
    own_branch = post or drop_scale is not None or gamma is not None or branch_dtype != dtype
    return dtype is not None and (not post or merge or grad_out is not None), branch_dtype is not None and own_branch
