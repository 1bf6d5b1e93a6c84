"""Between the image layout and the windows of each head, and the shift mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..common.caches import keep_tensors

Pair = tuple[int, int]


def pair(sizes: Sequence[int]) -> Pair:
    """What the dispatcher hands on as a list."""
    rows, columns = sizes
    return rows, columns


def pad_shifted(x: Tensor, pad: Pair, shift_size: Pair) -> Tensor:
    """(B, H, W, C) with ``pad`` rows and columns of zeros more, at the end of the map as ``shift_size`` shifts it.

    Written in the layout before the shift. Without one the zeros follow the last row and column. With that of the
    attention they come where timm puts them: behind the rows that the shift has brought from the other edge, which
    the mask, made for the padded map, then does not tell from those of the last rows.
    """
    rows, columns = shift_size
    zeros = (0, 0, 0, pad[1], 0, pad[0])
    if not any(shift_size):
        return F.pad(x, zeros)
    return torch.roll(F.pad(torch.roll(x, (-rows, -columns), (1, 2)), zeros), (rows, columns), (1, 2))


def crop_shifted(x: Tensor, height: int, width: int, shift_size: Pair) -> Tensor:
    """The inverse of :func:`pad_shifted`: (B, height, width, C)."""
    rows, columns = shift_size
    if not any(shift_size):
        return x[:, :height, :width].contiguous()
    x = torch.roll(x, (-rows, -columns), (1, 2))[:, :height, :width]
    return torch.roll(x, (rows, columns), (1, 2))


def gather(x: Tensor, parts: int, window_size: Pair, shift_size: Pair) -> Tensor:
    """(B, H, W, parts·d) → own copy (parts, windows, B, N, d) of the rolled map."""
    batch, height, width, channels = x.shape
    n, d = window_size[0] * window_size[1], channels // parts
    rows, _ = _rows(batch, height, width, parts, window_size, shift_size, x.device)
    return x.reshape(-1, d).index_select(0, rows).view(parts, height * width // n, batch, n, d)


def scatter(x: Tensor, like: Tensor, window_size: Pair, shift_size: Pair) -> Tensor:
    """Inverse of :func:`gather`, in the map size of ``like``."""
    batch, height, width, _ = like.shape
    parts, d = x.shape[0], x.shape[-1]
    _, inverse = _rows(batch, height, width, parts, window_size, shift_size, x.device)
    return x.view(-1, d).index_select(0, inverse).view(batch, height, width, parts * d)


@keep_tensors
def _rows(batch: int, height: int, width: int, parts: int, window_size: Pair, shift_size: Pair, device: torch.device
          ) -> tuple[Tensor, Tensor]:
    """Where each row of (parts, windows, B, N) lies in (B, H, W, parts), and the inverse.

    Called inside custom ops only, so that what is cached is always a real tensor.
    """
    size = batch * height * width * parts
    # Half the memory of int64, and as fast.
    dtype = torch.int32 if size < 2**31 else torch.int64
    (wh, ww), rows = window_size, torch.arange(size, device=device).view(batch, height, width, parts)
    rows = rows.roll((-shift_size[0], -shift_size[1]), (1, 2))
    rows = rows.view(batch, height // wh, wh, width // ww, ww, parts).permute(5, 1, 3, 0, 2, 4).reshape(-1)
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(size, device=device)
    return rows.to(dtype), inverse.to(dtype)


@keep_tensors
def shift_mask(height: int, width: int, window_size: Pair, shift_size: Pair, dtype: torch.dtype, device: torch.device
               ) -> Tensor | None:
    """(windows, N, N) of 0/−100, built once per geometry; None without a shift."""
    if not any(shift_size):
        return None
    groups = reference.shift_groups(height, width, shift_size, device)
    groups = reference.partition(groups[None, ..., None], window_size)[..., 0]
    return (groups[:, :, None] != groups[:, None, :]).to(dtype).mul_(reference.MASKED_LOGIT)
