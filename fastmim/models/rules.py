"""What an encoder's arguments must satisfy, said without building one; the constructors ask the same functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .layers import to_pair

Pair = tuple[int, int]


def check_architecture(settings: dict[str, Any]) -> None:
    """The patch divides the image, the heads divide the channels, one number of heads per stage.

    Args:
        settings: Of :func:`fastmim.models.encoder_settings`.

    Raises:
        ValueError: ``argument=value: what; fix`` in one line.
    """
    patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"])
    if int(settings["embed_dim"] * settings["mlp_ratio"]) < 1:
        raise ValueError(f"mlp_ratio={settings['mlp_ratio']}: leaves the MLP no channel; use 4")
    if settings["name"] == "vit":
        check_heads(settings["num_heads"], settings["embed_dim"])
    else:
        check_stages(settings["num_heads"], settings["depths"], settings["embed_dim"])


def patch_grid(img_size: Pair, patch_size: int) -> Pair:
    """(rows, columns) of patches.

    Raises:
        ValueError: The patch does not divide both edges; names the nearest sizes that it divides.
    """
    if img_size[0] % patch_size or img_size[1] % patch_size:
        low = [max(edge // patch_size, 1) * patch_size for edge in img_size]
        high = [-(-edge // patch_size) * patch_size for edge in img_size]
        square = img_size[0] == img_size[1]
        options = dict.fromkeys(str(size[0] if square else size) for size in (low, high))
        shown = img_size[0] if square else list(img_size)
        raise ValueError(f"img_size={shown}: not divisible by patch_size {patch_size}; use {' or '.join(options)}")
    return img_size[0] // patch_size, img_size[1] // patch_size


def window_sizes(settings: Mapping[str, Any]) -> list[Pair]:
    """Of each stage of a Swin the window in tokens; one larger than the map shrinks to it."""
    rows, columns = patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"])
    height, width = to_pair(settings["window_size"], "window_size")
    maps = [(math.ceil(rows / 2**stage), math.ceil(columns / 2**stage)) for stage in range(len(settings["depths"]))]
    return [(min(height, rows), min(width, columns)) for rows, columns in maps]


def check_heads(num_heads: int, embed_dim: int) -> None:
    """A ViT's heads divide its channels.

    Raises:
        ValueError: Names the nearest number that does.
    """
    if not isinstance(num_heads, int):
        raise ValueError(f"num_heads={list(num_heads)}: vit takes one number")
    _divides(num_heads, num_heads, embed_dim, "")


def check_stages(num_heads: int | Sequence[int], depths: Sequence[int], embed_dim: int) -> None:
    """A Swin has one number of heads per stage, and each divides the channels, which double from stage to stage.

    Raises:
        ValueError: Names the stage and the nearest number that divides its channels.
    """
    if isinstance(num_heads, int) or len(num_heads) != len(depths):
        shown = num_heads if isinstance(num_heads, int) else list(num_heads)
        raise ValueError(f"num_heads={shown}: must list one number per stage, as depths={list(depths)} does")
    for stage, count in enumerate(num_heads):
        _divides(count, list(num_heads), embed_dim * 2**stage, f" of stage {stage}")


def _divides(count: int, num_heads: int | list[int], channels: int, where: str) -> None:
    if count < 1 or channels % count:
        small = [c for c in range(1, math.isqrt(channels) + 1) if channels % c == 0]
        near = min((c for pair in ((c, channels // c) for c in small) for c in pair), key=lambda c: (abs(c - count), c))
        what = f"{count} does not divide the {channels} channels{where}"
        raise ValueError(f"num_heads={num_heads}: {what}; use {near}")
