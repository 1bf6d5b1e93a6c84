"""Window attention from its definition: no cyclic shift, no partition, no mask of seams; every pair of tokens is asked.

Windows cut the plane at ``shift + k·window`` (Liu et al. 2021, figure 2 and section 3.2). A map that does not end at a
multiple of the window goes on in zeros up to the next one; they are keys like the tokens, and no one reads them.
"""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


def same_window(size: Pair, window: Pair, shift: Pair) -> Tensor:
    """(H·W, H·W) bool: whether two tokens of a map are in one window."""
    rows, columns = (torch.arange(s).sub(o).div(w, rounding_mode="floor") for s, w, o in
                     zip(size, window, shift, strict=True))  # fmt: skip
    cell = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)
    return (cell[:, None] == cell[None]).all(-1)


def reach(size: Pair, window: Pair, shift: Pair) -> Tensor:
    """(H·W, H·W) bool: whether a token of the second axis can change one of the first, in a block without a shift and
    then one with it."""
    step = [same_window(size, window, s).double() for s in (shift, (0, 0))]
    return step[0] @ step[1] > 0


def attend(block: Any, x: Tensor) -> Tensor:
    """What timm's ``block._attn`` is meant to compute of (B, H, W, C), with the parameters of ``block.attn``."""
    attn, (window, shift) = block.attn, (block.window_size, block.shift_size)
    height, width = x.shape[1:3]
    size = tuple(-(-edge // w) * w for edge, w in zip((height, width), window, strict=True))
    x = F.pad(x, (0, 0, 0, size[1] - width, 0, size[0] - height))
    cosine = hasattr(attn, "cpb_mlp")
    bias = attn.qkv.bias if not cosine else torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
    qkv = F.linear(x, attn.qkv.weight, bias).flatten(1, 2).unflatten(2, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if cosine:
        q, k = F.normalize(q, dim=-1) * attn.logit_scale.clamp(max=math.log(100)).exp(), F.normalize(k, dim=-1)
    else:
        q = q * q.shape[-1] ** -0.5
    near = same_window(size, window, shift)
    logits = q @ k.mT + _position_bias(attn, size, window, near)
    out = logits.masked_fill(~near, -math.inf).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2).unflatten(1, size)[:, :height, :width]
    return F.linear(out, attn.proj.weight, attn.proj.bias)


def _position_bias(attn: Any, size: Pair, window: Pair, near: Tensor) -> Tensor:
    """(heads, H·W, H·W), of pairs of one window."""
    position = torch.cartesian_prod(*map(torch.arange, size))
    offset = (position[:, None] - position[None]).where(near[..., None], 0)
    entry = (offset[..., 0] + window[0] - 1) * (2 * window[1] - 1) + offset[..., 1] + window[1] - 1
    if not hasattr(attn, "cpb_mlp"):
        return F.embedding(entry, attn.relative_position_bias_table).permute(2, 0, 1)
    offsets = torch.cartesian_prod(*(torch.arange(1 - edge, edge) for edge in window))
    relative = 8 * offsets / torch.tensor([max(edge - 1, 1) for edge in window])
    coordinates = relative.sign() * torch.log2(1 + relative.abs()) / math.log2(8)
    table = 16 * attn.cpb_mlp(coordinates.to(attn.proj.weight.dtype)).sigmoid()
    return F.embedding(entry, table).permute(2, 0, 1)


def as_defined(model: nn.Module) -> nn.Module:
    """A copy of a timm Swin or SwinV2 whose blocks attend by :func:`attend`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "_attn"):
            module._attn = MethodType(attend, module)
    return model
