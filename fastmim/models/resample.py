"""Position biases and positions that were learnt at one size, for another one."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def resample_bias_table(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """A table of relative position biases for another window, as microsoft/SimMIM's fine-tuning makes it.

    The learnt offsets are put at distances that grow geometrically, so that they reach as far as the new window's while
    near ones keep theirs; between them a bicubic spline interpolates.

    Args:
        table: ((2h − 1)(2w − 1), heads), offsets of rows, then of columns.
        old: (h, w), the window that it was learnt with.
        new: (h', w').

    Returns:
        ((2h' − 1)(2w' − 1), heads) of the same dtype; the table itself where nothing changes.

    Raises:
        ValueError: The table has not the old window's size, or a smaller window than 2 on a changed edge.
        ImportError: SciPy is missing.
    """
    from scipy.interpolate import RectBivariateSpline

    spans = tuple(2 * edge - 1 for edge in old)
    if table.ndim != 2 or len(table) != spans[0] * spans[1]:
        raise ValueError(f"a table of {tuple(table.shape)}: a window of {old[0]} × {old[1]} has {spans[0] * spans[1]}")
    if old == new:
        return table
    known = [_geometric(old_edge, new_edge) for old_edge, new_edge in zip(old, new, strict=True)]
    wanted = [np.arange(1.0 - edge, edge) for edge in new]
    degrees = dict(zip(("kx", "ky"), (min(3, len(places) - 1) for places in known), strict=True))
    planes = table.detach().double().cpu().numpy().T.reshape(-1, *spans)
    made = [RectBivariateSpline(*known, plane, **degrees)(*wanted) for plane in planes]
    return torch.from_numpy(np.stack(made).reshape(len(planes), -1).T.copy()).to(table)


def _geometric(old: int, new: int) -> np.ndarray:
    """(2 old − 1,) where the offsets lie: 0, ±1, ±(1 + q), ±(1 + q + q²), …, up to about new − 1."""
    if old < 2:
        raise ValueError(f"a window of {old} token: has no offsets that another one could be made of")
    # Halved until 1e-6 apart, and the last ratio tried is taken: published weights were resampled so.
    steps = old - 1
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio**steps) / (1 - ratio)
        low, high = (low, ratio) if reach > new - 1 else (ratio, high)
    right = np.array(list(accumulate(ratio**i for i in range(steps))))
    return np.concatenate([-right[::-1], [0.0], right])


def resample_class_table(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """:func:`resample_bias_table` of a ViT's patch offsets; its last three rows, of the class token, stay."""
    return torch.cat((resample_bias_table(table[:-3], old, new), table[-3:]))


def resample_positions(positions: Tensor, old: Pair, new: Pair) -> Tensor:
    """(1, 1 + hw, D) learnt positions, the class token's first, for another grid: bicubic, as MAE's fine-tuning does.

    The positions themselves where nothing changes. What DINO and iBOT do within a step for small crops differs from it:
    see :func:`fastmim.models.positions.resize_positions`.

    Raises:
        ValueError: They are not those of the old grid.
    """
    if positions.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"{positions.shape[1]} positions: a grid of {old[0]} × {old[1]} has {1 + old[0] * old[1]}")
    if old == new:
        return positions
    inner = positions[:, 1:].unflatten(1, old).permute(0, 3, 1, 2).float()
    resized = F.interpolate(inner, size=new, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat((positions[:, :1], resized.to(positions.dtype)), 1)
