"""Weights learnt at one image or window size, made to fit another one: tables of position biases and positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..models.layers import to_pair
from ..models.resample import resample_bias_table, resample_class_table, resample_positions
from ..models.rules import patch_grid, window_sizes

Pair = tuple[int, int]
_TABLE = "relative_position_bias_table"
_SHARED = f"rel_pos_bias.{_TABLE}"
_CLASS_ROWS = 3


def fit_sizes(
    encoder: nn.Module, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of an encoder, those resampled that were learnt for another window or grid.

    A ViT's table for all blocks is copied to every block where the encoder has one in each (SimMIM's fine-tuning).

    Args:
        encoder: What they go into.
        tensors: By timm's names.
        stored: The settings that made them, or {}: windows and grids are then taken for square.

    Returns:
        The tensors, and a sentence for each kind that was changed.

    Raises:
        ValueError: A table is of no window.
    """
    own = dict(encoder.named_parameters())
    fitted, changed = dict(tensors), {}
    shared = fitted.get(_SHARED)
    blocks = [name for name in own if name.startswith("blocks.") and name.endswith(_TABLE)]
    if shared is not None and _SHARED not in own and blocks:
        del fitted[_SHARED]
        fitted |= dict.fromkeys(blocks, shared)
        changed[_SHARED] = f"{_SHARED} copied to {len(blocks)} blocks"
    settings: Mapping[str, Any] = encoder.settings  # type: ignore[assignment]
    for name, tensor in fitted.items():
        wanted = own.get(name)
        if wanted is None or tensor.ndim != wanted.ndim or tensor.shape == wanted.shape:
            continue
        sizes = _sizes(name, tensor, settings, stored)
        if sizes is not None:
            how, old, new = sizes
            fitted[name] = how(tensor, old, new)
            kind = f"{_last(name)} {_show(old)} to {_show(new)}"
            changed.setdefault(kind, f"{kind} resampled ({name} and what is like it)")
    return fitted, list(changed.values())


def _sizes(name: str, tensor: Tensor, own: Mapping[str, Any], stored: Mapping[str, Any]) -> Any:
    """(how, old, new) of a tensor that depends on a size; None of another one."""
    if _last(name) == "pos_embed":
        return resample_positions, _grid(stored) or _square(tensor.shape[1] - 1), _grid(own)
    if _last(name) != _TABLE:
        return None
    if own["name"] == "vit":
        return resample_class_table, _grid(stored) or _window(len(tensor) - _CLASS_ROWS, name), _grid(own)
    stage = int(name.split(".")[1])
    old = window_sizes(stored)[stage] if stored else _window(len(tensor), name)
    return resample_bias_table, old, window_sizes(own)[stage]


def _grid(settings: Mapping[str, Any]) -> Pair | None:
    return patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"]) if settings else None


def _square(count: int) -> Pair:
    edge = math.isqrt(count)
    return edge, edge


def _window(entries: int, name: str) -> Pair:
    span = math.isqrt(entries)
    if span * span != entries or span % 2 == 0:
        raise ValueError(f"{name} has {entries} rows: those of no square window")
    return (span + 1) // 2, (span + 1) // 2


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _show(pair: Pair) -> str:
    return f"{pair[0]} × {pair[1]}"
