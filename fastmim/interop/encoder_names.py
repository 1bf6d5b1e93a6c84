"""Which parameter of an encoder a foreign name means, and which tensors of a file are none of the encoder's."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Recomputed at construction; never loaded."""
DECODER = "decoder_"
"""What MAE's names begin with where they are not the encoder's."""
MASK_TOKENS = ("mask_token", "masked_embed")
_HEADS = ("head.", "lm_head.")
_FIRST_MERGING = "layers.0.downsample.reduction.weight"
_LAYER_SCALE = re.compile(r"\bls([12])\.gamma$")


class Named(NamedTuple):
    """Of the names below an encoder's prefix: foreign → own, and foreign → why it is left out."""

    own: dict[str, str]
    left_out: dict[str, str]


def encoder_names(names: Collection[str], *, mask_token: bool = False) -> Named:
    """What the names of an encoder mean: timm's, Microsoft's, and those of the projects that follow them.

    A name that nobody knows stays as it is, and is found to be unknown where the weights are copied.

    Args:
        names: Without wrappers and without the prefix of the encoder.
        mask_token: Whether it is wanted too, where it is an encoder's and not that of MAE's decoder.
    """
    of_decoder = any(name.startswith(DECODER) for name in names)
    merges_at_end = _FIRST_MERGING in names
    own, left_out = {}, {}
    for name in names:
        reason = _why_not(name, mask_token and not of_decoder)
        if reason is not None:
            left_out[name] = reason
        else:
            own[name] = _LAYER_SCALE.sub(r"gamma_\1", shift_downsample(name) if merges_at_end else name)
    return Named(own, left_out)


def _why_not(name: str, mask_token: bool) -> str | None:
    if name.rsplit(".", 1)[-1] in BUFFERS:
        return "made anew from the sizes"
    if name.startswith(DECODER):
        return "decoder of the pretraining"
    if name.startswith(_HEADS):
        return "head"
    if name in MASK_TOKENS and not (mask_token and name == "mask_token"):
        return "stands for hidden patches, in pretraining alone"
    return None


def shift_downsample(name: str, by: int = 1) -> str:
    """Microsoft's name in timm's way: one merges patches at the end of a stage, the other at the start of the next.

    With ``by=-1`` timm's in Microsoft's.
    """
    return re.sub(r"\blayers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + by}.downsample.", name)
