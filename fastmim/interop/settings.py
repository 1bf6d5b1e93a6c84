"""The arguments of an encoder, found from the names and shapes of its weights, for files that do not say them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import SIZES, expand_size
from ..models.positions import SINCOS, sincos_positions
from .facts import spans_of_tensors

_TABLE = "relative_position_bias_table"
_HEAD_DIM = 64
_LAYER_SCALE = 0.1
_IBOT_EPS = 1e-6
_MOCO_HEADS = 12
"""Of all of MoCo v3's ViTs, its ViT-S with 384 channels included (Chen et al. 2021, section 5)."""


def find_settings(
    tensors: Mapping[str, Tensor], left: Mapping[str, Tensor], given: Mapping[str, Any], project: str
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of :func:`fastmim.models.create_encoder`, and a sentence for each that the weights do not tell.

    Args:
        tensors: Of the encoder, by our names.
        left: The file's other tensors, by their names: Microsoft's buffers tell windows and image size.
        given: Arguments that are known; they win.
        project: Whose file it is; of some, numbers are known that no tensor shows.

    Raises:
        ValueError: An argument cannot be found; the line names the key that says it.
    """
    known = expand_size(given) if given.get("name") else dict(given)
    family = _family(tensors)
    if known.get("name", family) != family:
        raise ValueError(f"model.name={given['name']}: the file holds the weights of a {family}")
    found = _of_projection(tensors)
    found |= _of_vit(tensors, known, project) if family == "vit" else _of_swin(tensors, left, known, project, family)
    notes = found.pop("notes")
    return {"name": family} | found | known, notes


def _family(tensors: Mapping[str, Tensor]) -> str:
    if "blocks.0.attn.qkv.weight" in tensors:
        return "vit"
    if "layers.0.blocks.0.attn.qkv.weight" in tensors:
        return "swinv2" if "layers.0.blocks.0.attn.logit_scale" in tensors else "swin"
    raise ValueError(f"neither a ViT (blocks.0.attn.qkv.weight) nor a Swin (layers.0.blocks.0.attn.qkv.weight); its "
                     f"first names are {', '.join(list(tensors)[:3])}")  # fmt: skip


def _of_projection(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, *patch = _shape(tensors, "patch_embed.proj.weight")
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError(f"patch_embed.proj.weight has patches of {tuple(patch)} pixels: only square ones are known")
    return {"patch_size": patch[0], "in_chans": channels, "embed_dim": width}


def _of_vit(tensors: Mapping[str, Tensor], known: Mapping[str, Any], project: str) -> dict[str, Any]:
    first = "blocks.0."
    width = _shape(tensors, "patch_embed.proj.weight")[0]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    shared = tensors.get(f"rel_pos_bias.{_TABLE}")
    table = tensors.get(f"{first}attn.{_TABLE}", shared)
    heads, note = (table.shape[1], None) if table is not None else _heads(width, depth, project)
    found = {
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(_shape(tensors, f"{first}mlp.fc1.weight")[0], width),
        "qkv_bias": f"{first}attn.q_bias" in tensors or f"{first}attn.qkv.bias" in tensors,
        "key_bias": f"{first}attn.qkv.bias" in tensors,
        "init_values": _LAYER_SCALE if f"{first}gamma_1" in tensors else None,
        "shared_rel_pos_bias": shared is not None,
        "rel_pos_bias": f"{first}attn.{_TABLE}" in tensors,
        "notes": [] if note is None or "num_heads" in known else [note],
    }
    grid = _grid(tensors.get("pos_embed"), table)
    if "img_size" not in known:
        if grid is None:
            raise ValueError("model.img_size: the file does not tell it; give model.img_size=[height, width]")
        found["img_size"] = grid * _shape(tensors, "patch_embed.proj.weight")[2]
    return found | {"abs_pos_embed": _positions(tensors.get("pos_embed"), grid)}


def _heads(width: int, depth: int, project: str) -> tuple[int, str]:
    """Of a ViT without tables of biases: what published ones of its width and depth have."""
    published = [one["num_heads"] for one in SIZES.values()
                 if one["name"] == "vit" and (one["embed_dim"], one["depth"]) == (width, depth)]  # fmt: skip
    heads = _MOCO_HEADS if project == "moco" else published[0] if published else max(width // _HEAD_DIM, 1)
    return heads, f"model.num_heads={heads} is a guess by the width, which no tensor shows; give another if it is wrong"


def _grid(positions: Tensor | None, table: Tensor | None) -> int | None:
    """Edge of the square of patches."""
    if positions is not None:
        edge = math.isqrt(positions.shape[1] - 1)
        return edge if edge * edge == positions.shape[1] - 1 else None
    window = None if table is None else _window(table.shape[0] - 3)
    return window


def _positions(positions: Tensor | None, grid: int | None) -> bool | str:
    """Learnt, or the fixed kind that they equal."""
    if positions is None:
        return False
    if grid is None or positions.shape[2] % 4 or positions.is_meta:
        return True
    for kind in SINCOS:
        fixed = sincos_positions((grid, grid), positions.shape[2], kind)
        if torch.allclose(positions.float(), fixed, atol=1e-6):
            return kind
    return True


def _of_swin(
    tensors: Mapping[str, Tensor], left: Mapping[str, Tensor], known: Mapping[str, Any], project: str, family: str
) -> dict[str, Any]:
    width, _, patch, _ = _shape(tensors, "patch_embed.proj.weight")
    blocks = {tuple(map(int, name.split(".")[1:4:2])) for name in tensors if ".blocks." in name}
    stages = range(1 + max(stage for stage, _ in blocks))
    first = "layers.0.blocks.0."
    per_head = "attn.logit_scale" if family == "swinv2" else f"attn.{_TABLE}"
    heads = [_shape(tensors, f"layers.{s}.blocks.0.{per_head}")[0 if family == "swinv2" else 1] for s in stages]
    found = {
        "depths": tuple(sum(stage == s for stage, _ in blocks) for s in stages),
        "num_heads": tuple(heads),
        "mlp_ratio": mlp_ratio(_shape(tensors, f"{first}mlp.fc1.weight")[0], width),
        "qkv_bias": f"{first}attn.q_bias" in tensors or f"{first}attn.qkv.bias" in tensors,
        "notes": [],
    }
    if project == "ibot":
        found["norm_eps"] = _IBOT_EPS
    windows = [_stage_window(tensors, left, s) for s in stages]
    if "window_size" not in known:
        if None in windows:
            raise ValueError("model.window_size: the file does not tell it; give model.window_size=… model.img_size=…")
        found["window_size"] = max(window for window in windows if window is not None)
    spans = [max(span) for span in spans_of_tensors(left)]
    if spans and spans != windows and "pretrained_window_size" not in known:
        found["pretrained_window_size"] = tuple(spans)
    if "img_size" not in known:
        if windows[-1] is None:
            raise ValueError("model.img_size: the file does not tell it; give model.img_size=…")
        found["img_size"] = _map_of_mask(left, windows[0] or 0) * patch or windows[-1] * patch * 2 ** stages[-1]
        found["notes"] = [f"model.img_size={found['img_size']} follows from the windows; give another if it is wrong"]
    return found


def _stage_window(tensors: Mapping[str, Tensor], left: Mapping[str, Tensor], stage: int) -> int | None:
    """Edge of its square windows in tokens, from a table of biases or from what Microsoft stores beside weights."""
    start = f"layers.{stage}.blocks.0.attn."
    if (table := tensors.get(start + _TABLE)) is not None:
        return _window(len(table))
    for name, tensor in left.items():
        if name.endswith(start + "relative_coords_table"):
            return (tensor.shape[1] + 1) // 2
        if name.endswith(start + "relative_position_index"):
            return math.isqrt(len(tensor))
    return None


def _map_of_mask(left: Mapping[str, Tensor], window: int) -> int:
    """Edge of the first map, from how many windows its shifted block masks; 0 where the file does not say."""
    for name, mask in left.items():
        if name.endswith("layers.0.blocks.1.attn_mask"):
            return window * math.isqrt(len(mask))
    return 0


def _window(entries: int) -> int | None:
    span = math.isqrt(max(entries, 0))
    return (span + 1) // 2 if span * span == entries and span % 2 else None


def mlp_ratio(hidden: int, width: int) -> float:
    """A float of which ``int(width · ratio)`` is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"holds no {name}, which every such encoder has")
    return tuple(tensors[name].shape)
