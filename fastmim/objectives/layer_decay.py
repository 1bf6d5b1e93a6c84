"""Learning rates that fall from the head down to the patches (Clark et al. 2020; BEiT, appendix)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

_BLOCK = re.compile(r"(?:layers\.(\d+)\.)?blocks\.(\d+)\.")
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")
_FIRST = ("patch_embed.", "cls_token", "pos_embed", "mask_token")


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """The layer of an encoder's parameter: 0 for patches and tokens, b + 1 for block b, and one more for the rest.

    Args:
        name: Within the encoder, in timm's way: a stage begins with the merging of patches, which belongs to the last
            block before it.
        depths: Blocks of each stage; of a ViT (depth,).
    """
    if name.startswith(_FIRST):
        return 0
    if found := _BLOCK.match(name):
        return sum(depths[: int(found[1] or 0)]) + int(found[2]) + 1
    if found := _MERGING.match(name):
        return sum(depths[: int(found[1])])
    return sum(depths) + 1


def scaled_groups(
    groups: list[dict[str, Any]], decay: float, depths: tuple[int, ...], encoder: str = "encoder."
) -> list[dict[str, Any]]:
    """The optimiser's groups, each split by layer; ``lr_scale`` = decay^(N + 1 - layer) with N blocks.

    Args:
        groups: Of :func:`~fastmim.objectives.groups.split_parameters`.
        decay: Factor from a layer to the one below; 1: all learn at the same rate, and the groups stay as they are.
        depths: See :func:`layer_of`.
        encoder: What the names of the encoder's parameters begin with; others belong to the last layer.
    """
    if decay == 1:
        return groups
    last, split = sum(depths) + 1, []
    for group in groups:
        layers: dict[int, list[tuple[nn.Parameter, str]]] = {}
        for param, name in zip(group["params"], group["param_names"], strict=True):
            inside = name.startswith(encoder)
            layer = layer_of(name.removeprefix(encoder), depths) if inside else last
            layers.setdefault(layer, []).append((param, name))
        for layer, members in sorted(layers.items()):
            params, names = (list(column) for column in zip(*members, strict=True))
            scale = decay ** (last - layer)
            own = {"name": f"{group['name']}:layer {layer}", "params": params, "param_names": names, "lr_scale": scale}
            split.append(group | own)
    return split


def depths_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Blocks of each stage, from :func:`fastmim.models.encoder_settings`; a ViT has one stage."""
    return (settings["depth"],) if settings["name"] == "vit" else tuple(settings["depths"])
