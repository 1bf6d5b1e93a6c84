"""Branches of a block, each with the residual norm behind it: ops that nobody looks between, as one node of autograd.

Where somebody does look (see :func:`.common.chain.define_chain`), the answer is None, and the caller takes the ops one
by one, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Both = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, ...]


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


class Branch(NamedTuple):
    """Ops from y, and their gradients; of :func:`attention` or :func:`mlp`."""

    forward: Callable[..., Tensor]
    """(:class:`.Forward`, dtype of the products, settings, y, *tensors) → the branch."""
    gradients: Callable[..., Gradients]
    """(:class:`.Backward`, whether that of y is wanted, gradient of the branch, what to add to that of y) → of y, …"""
    settings: Any
    tensors: tuple[Tensor | None, ...]


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


def attention(tensors: Attention, num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int]) -> Branch:
    """Shifted-window attention with its two products; arguments as of :func:`.window_attention.op.window_attention`."""
    return Branch(_attention, _attention_gradients, (num_heads, window_size, shift_size), tensors)


def mlp(weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, low_weight1: Tensor | None,
        low_weight2: Tensor | None, recompute_fc1: bool) -> Branch:
    """The MLP; arguments as of :func:`.mlp.op.mlp`."""
    tensors = weight1, bias1, weight2, bias2, low_weight1, low_weight2
    return Branch(_mlp, _mlp_gradients, recompute_fc1 or not torch.is_grad_enabled(), tensors)


def add_branches(x: Tensor, y: Tensor, branches: Sequence[tuple[Branch, Norm]], *, one_stream: bool, impl: str
                 ) -> Both | None:
    """The stream with all ``branches`` added, one after the other, and what reads it next.

    Args:
        x: (B, …, C), the stream.
        y: (B, …, C), what the first branch reads, in the dtype of the products.
        branches: Each reads the second result of the norm before it.
        one_stream: y is x, and with order "post" every branch reads the stream: its first product then adds the
            gradient of the stream to its own.

    Returns:
        The results of the last :func:`.residual_norm.op.residual_norm`, or None: take the ops one by one.
    """
    if y.dtype != (dtype := product_dtype(y)):
        return None
    links = [_Link(branch.forward, branch.gradients, branch.settings, len(branch.tensors), norm[5:])
             for branch, norm in branches]
    tensors = [t for branch, norm in branches for t in (*branch.tensors, *norm[:5])]
    found: Both | None = _CHAIN(impl, _How(dtype, one_stream, links), None if one_stream else x, y, *tensors)
    return found


class _Link(NamedTuple):
    forward: Callable[..., Tensor]
    gradients: Callable[..., Gradients]
    settings: Any
    size: int
    """Number of the branch's tensors, which the five of the norm follow."""
    norm: Any
    """Its order, eps and merge."""


class _How(NamedTuple):
    dtype: torch.dtype
    one_stream: bool
    links: list[_Link]


def _run(way: Forward, how: _How, x: Tensor | None, y: Tensor, *tensors: Any) -> Both:
    first, stream = 0, y if x is None else x
    for link in how.links:
        last = first + link.size
        branch = link.forward(way, how.dtype, link.settings, y, *tensors[first:last])
        weight, bias, branch_bias, drop_scale, gamma = tensors[last : last + 5]
        order, eps, merge = link.norm
        args = norm_arguments(stream, branch, weight, bias, branch_bias, drop_scale, gamma, order, eps, None, how.dtype,
                              merge)
        stream, y = way.run(NORM.hand_on, *args)
        first = last + 5
    return stream, y


def _gradients(way: Backward, how: _How, needs: tuple[bool, ...], d_x: Tensor | None, d_y: Tensor | None
               ) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i, link in reversed(list(enumerate(how.links))):
        d_x, d_branch, *d_norm = way.run(d_x, d_y)
        d_y, *d_own = link.gradients(way, i > 0 or needs[1], d_branch, d_x if how.one_stream else None)
        d_x = None if how.one_stream else d_x
        found = [*d_own, *d_norm, *found]
    return [d_x, d_y, *found]


def _attention(way: Forward, dtype: torch.dtype, settings: Any, y: Tensor, *tensors: Any) -> Tensor:
    qkv_weight, qkv_bias, low_qkv, low_qkv_bias, proj_weight, proj_bias, low_proj, bias, logit_scale = tensors
    num_heads, window_size, shift_size = settings
    qkv = way.run(LINEAR, *linear_arguments(y, qkv_weight, qkv_bias, low_qkv, low_qkv_bias, dtype))
    check_attention(qkv, bias, num_heads, window_size, shift_size, logit_scale)
    out = way.run(ATTENTION, qkv, bias, logit_scale, num_heads, window_size, shift_size)
    found: Tensor = way.run(LINEAR, *linear_arguments(out, proj_weight, proj_bias, low_proj, None, dtype))
    return found


def _attention_gradients(way: Backward, need_y: bool, grad: Tensor, add: Tensor | None) -> Gradients:
    d_out, d_proj, d_proj_bias = way.run(grad)
    d_qkv, d_bias, d_scale = way.run(d_out)
    d_y, d_weight, d_qkv_bias = way.run(d_qkv, add, need_first=need_y)
    return d_y, d_weight, d_qkv_bias, None, None, d_proj, d_proj_bias, None, d_bias, d_scale


def _mlp(way: Forward, dtype: torch.dtype, recompute_fc1: bool, y: Tensor, *tensors: Any) -> Tensor:
    weight1, bias1, weight2, bias2, low_weight1, low_weight2 = tensors
    *args, _ = mlp_arguments(y, weight1, bias1, weight2, bias2, low_weight1, low_weight2, recompute_fc1, dtype)
    # Without a graph is how this runs: whether one is made was asked before.
    found: Tensor = way.run(MLP, *args, recompute_fc1)
    return found


def _mlp_gradients(way: Backward, need_y: bool, grad: Tensor, add: Tensor | None) -> Gradients:
    return *way.run(grad, add), None, None


_CHAIN = define_chain("branches", _run, _gradients)
