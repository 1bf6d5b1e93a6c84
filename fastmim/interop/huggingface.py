"""Folders of transformers: the names of ``SwinModel``, ``Swinv2Model``, ``ViTModel`` and ``BeitModel``, both ways.

The names are those in files of the hub, which every version of transformers reads and writes. Query, key and value are
three matrices there and one here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PATCHES = "embeddings.patch_embeddings.projection.weight"
"""By which the names are known, and what stands before them."""
_PARTS = ("query", "key", "value")
# Ours → theirs, the first that fits; {a} is where their attention's own parameters are.
_OUTSIDE = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^rel_pos_bias\.", "encoder.relative_position_bias."),
    (r"^norm\.", "layernorm."),
    (r"^layers\.", "encoder.layers."),
    (r"^blocks\.", "encoder.layer."),
)
_INSIDE = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.gamma_(\d)$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
    (r"^(encoder\.layer\..*)\.attn\.(relative_position_bias_table)$",
     r"\1.attention.attention.relative_position_bias.\2"),
    (r"\.attn\.q_bias$", ".{a}.query.bias"),
    (r"\.attn\.v_bias$", ".{a}.value.bias"),
    (r"\.attn\.", ".{a}."),
)  # fmt: skip
_LEFT_OUT = (
    (r"(^|\.)(relative_position_index|relative_coords_table)$", "made anew from the sizes"),
    (r"^(classifier|pooler|lm_head)\.|^decode_head\.|^auxiliary_head\.", "head"),
    (r"^decoder\.", "decoder of the pretraining"),
    (r"(^|\.)mask_token$", "stands for hidden patches, in pretraining alone"),
)


def their_names(name: str) -> list[str]:
    """Of a parameter of ours; of a fused projection those of query, key and value, in the order of its rows."""
    name = re.sub(r"^(layers)\.(\d+)\.(downsample)\.", lambda m: f"{m[1]}.{int(m[2]) - 1}.{m[3]}.", name)
    name = _first_of(_OUTSIDE, name)
    name = _first_of(_INSIDE, name) if ".layer." in name or ".blocks." in name else name
    name = name.replace("{a}", "attention.self" if ".blocks." in name else "attention.attention")
    return [name.replace(".qkv.", f".{part}.") for part in _PARTS] if ".qkv." in name else [name]


def _first_of(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, to in rules:
        renamed, count = re.subn(pattern, to, name)
        if count:
            return renamed
    return name


def to_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's weights by our names → by theirs."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = their_names(name)
        found |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    return found


def from_huggingface(
    tensors: Mapping[str, Tensor], wanted: list[str]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """A file's weights by our names.

    Args:
        tensors: By their names, with or without ``swin.`` and the like before those of the encoder.
        wanted: The parameters of an encoder of that kind.

    Returns:
        The tensors by our names, of each of their names ours, and of each that is left out why.

    Raises:
        ValueError: A tensor of the encoder is missing, or one is unknown; all are named.
    """
    prefix = next(name for name in tensors if name.endswith(PATCHES)).removesuffix(PATCHES)
    found: dict[str, Tensor] = {}
    used: dict[str, str] = {}
    missing = []
    for name in wanted:
        theirs = [prefix + one for one in their_names(name)]
        missing += [one for one in theirs if one not in tensors]
        parts = [tensors[one] for one in theirs if one in tensors]
        used |= {one: name for one in theirs if one in tensors}
        found[name] = parts[0] if len(theirs) == 1 and parts else torch.cat(parts) if parts else torch.empty(0)
    rest = {name: _why_not(name.removeprefix(prefix)) for name in tensors if name not in used}
    unknown = [name for name, reason in rest.items() if reason is None]
    problems = [f"{len(names)} {what} ({', '.join(names)})"
                for what, names in (("unknown", unknown), ("missing", missing)) if names]  # fmt: skip
    if problems:
        raise ValueError(f"weights do not fit the model: {'; '.join(problems)}")
    return found, used, {name: str(reason) for name, reason in rest.items()}


def _why_not(name: str) -> str | None:
    return next((reason for pattern, reason in _LEFT_OUT if re.search(pattern, name)), None)
