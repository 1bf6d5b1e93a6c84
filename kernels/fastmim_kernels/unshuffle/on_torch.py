"""``unshuffle`` in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.rows import cast, marked_sum, statistics_dtype


def forward(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Arguments and result of the op ``fastmim::unshuffle``."""
    b, kept, c = tokens.shape
    positions = pos_embed.reshape(-1, c)
    rows = _rows(places, kept)
    out = cast(positions + mask_token.reshape(-1), out_dtype).expand(b, -1, -1).contiguous()
    seen = cast(tokens + F.embedding(rows, positions), out_dtype)
    out.view(-1, c).index_copy_(0, _flat(rows, len(positions)), seen.view(-1, c))
    return out


def backward(grad: Tensor, places: Tensor, kept: int, pos: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::unshuffle_backward``."""
    grad = grad.contiguous()
    b, length, c = grad.shape
    rows = _flat(_rows(places, kept), length)
    d_tokens = cast(grad.view(-1, c).index_select(0, rows), dtype).view(b, kept, c)
    d_token = marked_sum(grad, F.pad(places < 0, (1, 0)))
    wide = statistics_dtype(grad.dtype)
    return d_tokens, d_token, grad.sum(0, dtype=wide) if pos else grad.new_empty(0, dtype=wide)


def _rows(places: Tensor, kept: int) -> Tensor:
    """(B, kept): of each token its row in the result; the class token's is 0."""
    rows = places.new_zeros(places.shape[0], kept)
    order = torch.arange(1, places.shape[1] + 1, device=places.device).expand_as(places)
    # Hidden patches all land on the class token's.
    rows.scatter_(1, places + 1, order)
    rows[:, 0] = 0
    return rows


def _flat(rows: Tensor, length: int) -> Tensor:
    return (rows + torch.arange(len(rows), device=rows.device).unsqueeze(1) * length).view(-1)
