"""A branch of a block and the residual norm behind it: two or four ops that nobody looks between, as one node.

Where somebody does look (see :func:`.common.chain.define_chain`), the answer is None, and the caller takes the ops one
by one, with the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common.chain import Backward, Forward, define_chain
from .linear.op import OP as LINEAR
from .linear.op import arguments as linear_arguments
from .linear.op import product_dtype
from .mlp.op import OP as MLP
from .mlp.op import arguments as mlp_arguments
from .residual_norm.op import OP as NORM
from .residual_norm.op import arguments as norm_arguments
from .window_attention.op import OP as ATTENTION
from .window_attention.op import check as check_attention

Pair = tuple[int, int]
Both = tuple[Tensor, Tensor]


class Norm(NamedTuple):
    """The residual norm behind a branch: tensors, then settings, as of :func:`.residual_norm.op.residual_norm`."""

    weight: Tensor
    bias: Tensor
    branch_bias: Tensor | None
    drop_scale: Tensor | None
    gamma: Tensor | None
    order: str
    eps: float
    merge: bool = False


class _How(NamedTuple):
    """What is no tensor: of the norm, then of the branch."""

    order: str
    eps: float
    merge: bool
    dtype: torch.dtype
    """Of the products, and of the second result."""
    one_stream: bool
    """The branch reads the stream itself, and its first product adds the gradient of the norm's residual to its own."""
    settings: Any


class Attention(NamedTuple):
    """Weights, and their copies in the dtype of the products, if there are any, of window attention."""

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    low_qkv: Tensor | None
    low_qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    low_proj: Tensor | None
    bias: Tensor
    logit_scale: Tensor | None


def attention_and_norm(x: Tensor | None, y: Tensor, parts: Attention, num_heads: int, window_size: Pair,
                       shift_size: Pair, norm: Norm, *, impl: str) -> Both | None:
    """Shifted-window attention of y with its two products, then the residual norm with the stream x.

    Args:
        x: (B, H, W, C), the residual; None: it is y, whose gradient is then that of both.
        y: (B, H, W, C) in the dtype of the products.
        num_heads, window_size, shift_size: As of :func:`.window_attention.op.window_attention`.

    Returns:
        The results of :func:`.residual_norm.op.residual_norm`, or None: take the ops one by one.
    """
    if y.dtype != (dtype := product_dtype(y)):
        return None
    how = _How(norm.order, norm.eps, norm.merge, dtype, x is None, (num_heads, window_size, shift_size))
    found: Both | None = _ATTENTION(impl, how, x, y, *parts, *norm[:5])
    return found


def mlp_and_norm(x: Tensor | None, y: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor,
                 bias2: Tensor | None, low_weight1: Tensor | None, low_weight2: Tensor | None, recompute_fc1: bool,
                 norm: Norm, *, impl: str) -> Both | None:
    """The MLP of y, then the residual norm with the stream x; as :func:`attention_and_norm`."""
    if y.dtype != (dtype := product_dtype(y)):
        return None
    *tensors, recompute_fc1 = mlp_arguments(y, weight1, bias1, weight2, bias2, low_weight1, low_weight2, recompute_fc1,
                                            dtype)
    how = _How(norm.order, norm.eps, norm.merge, dtype, x is None, recompute_fc1)
    found: Both | None = _MLP(impl, how, x, *tensors, *norm[:5])
    return found


def _attention(way: Forward, how: _How, x: Tensor | None, y: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None,
               low_qkv: Tensor | None, low_qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
               low_proj: Tensor | None, bias: Tensor, logit_scale: Tensor | None, *norm: Any) -> Both:
    qkv = way.run(LINEAR, *linear_arguments(y, qkv_weight, qkv_bias, low_qkv, low_qkv_bias, how.dtype))
    num_heads, window_size, shift_size = how.settings
    check_attention(qkv, bias, num_heads, window_size, shift_size, logit_scale)
    out = way.run(ATTENTION, qkv, bias, logit_scale, num_heads, window_size, shift_size)
    branch = way.run(LINEAR, *linear_arguments(out, proj_weight, proj_bias, low_proj, None, how.dtype))
    return _norm(way, how, y if x is None else x, branch, *norm)


def _attention_gradients(way: Backward, how: _How, needs: tuple[bool, ...], *grads: Tensor | None
                         ) -> tuple[Tensor | None, ...]:
    d_x, d_branch, *d_norm = way.run(*grads)
    d_out, d_proj, d_proj_bias = way.run(d_branch)
    d_qkv, d_bias, d_scale = way.run(d_out)
    d_y, d_qkv_weight, d_qkv_bias = way.run(d_qkv, d_x if how.one_stream else None, need_first=needs[1])
    return (None if how.one_stream else d_x, d_y, d_qkv_weight, d_qkv_bias, None, None, d_proj, d_proj_bias, None,
            d_bias, d_scale, *d_norm)


def _mlp(way: Forward, how: _How, x: Tensor | None, y: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor,
         bias2: Tensor | None, low_weight1: Tensor | None, low_weight2: Tensor | None, *norm: Any) -> Both:
    branch = way.run(MLP, y, weight1, bias1, weight2, bias2, low_weight1, low_weight2, how.settings)
    return _norm(way, how, y if x is None else x, branch, *norm)


def _mlp_gradients(way: Backward, how: _How, needs: tuple[bool, ...], *grads: Tensor | None
                   ) -> tuple[Tensor | None, ...]:
    d_x, d_branch, *d_norm = way.run(*grads)
    d_mlp = way.run(d_branch, d_x if how.one_stream else None)
    return None if how.one_stream else d_x, *d_mlp, None, None, *d_norm


def _norm(way: Forward, how: _How, x: Tensor, branch: Tensor, *norm: Any) -> Both:
    settings: Any = how.order, how.eps, None, how.dtype, how.merge
    found: Both = way.run(NORM.hand_on, *norm_arguments(x, branch, *norm, *settings))
    return found


_ATTENTION = define_chain("attention_and_norm", _attention, _attention_gradients)
_MLP = define_chain("mlp_and_norm", _mlp, _mlp_gradients)
