"""What an encoder's arguments must satisfy, said without building one; the constructors ask the same functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .layers import to_pair
from .positions import check_positions

Pair = tuple[int, int]
AUTOENCODERS = ("dvae", "dalle")
"""Families of :mod:`.dvae` and :mod:`.dalle`: images in, images out, codes between."""


MOST = {"img_size": 16384, "patch_size": 1024, "in_chans": 4096, "embed_dim": 65536, "depths": 1000, "depth": 1000,
        "num_heads": 4096, "window_size": 1024, "pretrained_window_size": 1024, "mlp_ratio": 64,
        "codes": 65536, "code_dim": 65536}  # fmt: skip
"""Beyond these no machine could hold the encoder, and rules that look for near values would not end."""


def check_architecture(settings: dict[str, Any]) -> None:
    """No number is absurd, the patch divides the image, the heads divide the channels, one number of heads per stage.

    Args:
        settings: Of :func:`fastmim.models.encoder_settings`.

    Raises:
        ValueError: ``argument=value: what; fix`` in one line.
    """
    for key, most in MOST.items():
        value = settings.get(key) or 0
        if max(value if isinstance(value, (tuple, list)) else [value]) > most:
            raise ValueError(f"{key}={value}: at most {most}; no machine could hold such an encoder")
    patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"])
    if settings["name"] in AUTOENCODERS:
        check_power("patch_size", settings["patch_size"], only=8 if settings["name"] == "dalle" else None)
    elif settings["name"] == "vit":
        check_heads(settings["num_heads"], settings["embed_dim"])
        check_positions(settings["abs_pos_embed"], settings["embed_dim"])
    else:
        check_stages(settings["num_heads"], settings["depths"], settings["embed_dim"])


def check_power(name: str, value: int, only: int | None = None) -> None:
    """A code's edge is halved to one pixel; of a published architecture it is ``only`` one number.

    Raises:
        ValueError: Names the nearest values.
    """
    if only is not None and value != only:
        raise ValueError(f"{name}={value}: must be {only}")
    if value < 2 or value & (value - 1):
        low = max(1 << value.bit_length() - 1, 2)
        raise ValueError(f"{name}={value}: must be a power of two; use {low}" + (f" or {2 * low}" if value > 2 else ""))


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


def encoder_stride(settings: Mapping[str, Any]) -> int:
    """Pixels of the edge of a final token; every stage of a Swin but the first halves the map."""
    stride: int = settings["patch_size"] * 2 ** (len(settings.get("depths", (1,))) - 1)
    return stride


def window_sizes(settings: Mapping[str, Any]) -> list[Pair]:
    """Of each stage of a Swin the window in tokens; one larger than the map shrinks to it."""
    height, width = to_pair(settings["window_size"], "window_size")
    return [(min(height, rows), min(width, columns)) for rows, columns in stage_maps(settings)]


def policy_matters(settings: Mapping[str, Any]) -> bool:
    """Whether an encoder computes something else under the other ``policy``.

    A Swin does where it shifts windows over a map whose last window, after the shift, is neither whole nor half full:
    a half ends where the mask of the padded map has its seam.
    """
    if "policy" not in settings:
        return False
    stages = zip(settings["depths"], stage_maps(settings), window_sizes(settings), strict=True)
    return any(depth > 1 and any(2 * edge % w for edge, w in zip(edges, window, strict=True))
               for depth, edges, window in stages)  # fmt: skip


def stage_maps(settings: Mapping[str, Any]) -> list[Pair]:
    """(rows, columns) of tokens of each stage of a Swin."""
    rows, columns = patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"])
    return [(math.ceil(rows / 2**stage), math.ceil(columns / 2**stage)) for stage in range(len(settings["depths"]))]


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
        near = min((c for c in range(1, channels + 1) if channels % c == 0), key=lambda c: abs(c - count))
        what = f"{count} does not divide the {channels} channels{where}"
        raise ValueError(f"num_heads={num_heads}: {what}; use {near}")
