"""Arguments and closed-form bytes of every op at the size of an encoder, for ``bench_kernels.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim.models.layers import relative_position_index
from fastmim.models.swin_shared import relative_coords_table
from fastmim_kernels.distillation.op import traffic as distillation_traffic
from fastmim_kernels.local_norm.op import traffic as local_norm_traffic
from fastmim_kernels.mask_tokens.op import traffic as mask_tokens_traffic
from fastmim_kernels.masked_loss.linear_op import linear_traffic
from fastmim_kernels.masked_loss.op import traffic as masked_l1_traffic
from fastmim_kernels.mlp.gelu import traffic as gelu_traffic
from fastmim_kernels.mlp.op import traffic as mlp_traffic
from fastmim_kernels.patch_merge.op import traffic as patch_merge_traffic
from fastmim_kernels.position_bias.op import BiasPlan, bias_plan
from fastmim_kernels.position_bias.op import traffic as position_bias_traffic
from fastmim_kernels.residual_norm.op import traffic as residual_norm_traffic
from fastmim_kernels.unshuffle.op import traffic as unshuffle_traffic
from fastmim_kernels.visible_attention.op import traffic as visible_attention_traffic
from fastmim_kernels.window_attention.op import traffic as window_attention_traffic

GRID = 48  # tokens a side in the first stage at 192 px, where the maps are largest


@dataclass(frozen=True)
class Work:
    """Arguments of one op; ``low`` are in the low precision, ``grads`` get gradients, bytes are closed forms."""

    arguments: dict[str, Any]
    low: tuple[str, ...]
    grads: tuple[str, ...]
    bytes_forward: int | None = None
    bytes_backward: int | None = None
    together: bool = False
    """The gradients are made in the forward pass: only both passes together can be compared."""


def stage(size: dict[str, Any], index: int) -> dict[str, Any]:
    """``size`` as its works see it where an encoder has halved the map and doubled the channels ``index`` times."""
    edge = GRID >> index
    return size | {"embed_dim": size["embed_dim"] << index, "num_heads": size["num_heads"][index:], "grid": edge,
                   "depths": size["depths"][index:], "window_size": min(size["window_size"], edge)}  # fmt: skip


SHAPE_KEYS = ("grid", "channels", "heads", "window", "family")
VIT_OPS = ("residual_norm", "mlp", "gelu", "mask_tokens", "masked_l1", "linear_masked_l1", "local_norm_target",
           "distillation", "unshuffle")  # fmt: skip
LOSSES = ("masked_l1", "linear_masked_l1")


def own_shape(text: str) -> dict[str, Any]:
    """``grid=56,channels=96,heads=3,window=7[,family=swin]`` as the works see a size.

    Raises:
        ValueError: a key is missing, unknown or no whole number, or the numbers do not fit each other.
    """
    given = dict(part.partition("=")[::2] for part in text.split(","))
    family = given.setdefault("family", "swin")
    wrong = sorted(set(given) ^ set(SHAPE_KEYS))
    if wrong:
        raise ValueError(f"{text!r}: {wrong[0]} is {'unknown' if wrong[0] in given else 'missing'}; give "
                         "grid=56,channels=96,heads=3,window=7, and family=swinv2 if it is one")  # fmt: skip
    if family not in ("swin", "swinv2"):
        raise ValueError(f"family={family}: use swin or swinv2; for a ViT --model vit_base")
    for key in SHAPE_KEYS[:-1]:
        if not given[key].isdecimal() or int(given[key]) < 1:
            raise ValueError(f"{key}={given[key]}: use a whole number of at least 1")
    grid, channels, heads, window = (int(given[key]) for key in SHAPE_KEYS[:-1])
    if channels % heads:
        raise ValueError(f"channels={channels}: {heads} heads do not divide it")
    if window > grid or grid % 2:
        raise ValueError(f"grid={grid}: use an even number of at least window={window}")
    return {"name": family, "embed_dim": channels, "num_heads": (heads,), "depths": (2,), "window_size": window,
            "grid": grid, "img_size": 4 * grid, "own": True}  # fmt: skip


def ops_of(size: dict[str, Any], ops: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of ``ops`` that a size has shapes for, and why the others are left out."""
    found, reasons = [], []
    for op in ops:
        if size["name"] == "vit" and op not in VIT_OPS:
            reasons.append(f"{op} is left out: a ViT has none")
        elif op in LOSSES and size.get("own") and size["grid"] % 8:
            reasons.append(f"{op} is left out: three halvings of grid={size['grid']} give no whole map; use one of 8")
        else:
            found.append(op)
    return found, reasons


def _grid(size: dict[str, Any]) -> int:
    return size["img_size"] // size["patch_size"] if size["name"] == "vit" else size.get("grid", GRID)


def _tokens(size: dict[str, Any], batch: int) -> tuple[int, ...]:
    """Shape of a block's tokens but for the channels; a ViT has a class token more."""
    grid = _grid(size)
    return (batch, grid * grid + 1) if size["name"] == "vit" else (batch, grid, grid)


def _picture(size: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Edge of the image in pixels, of the mask in patches, of the last map in tokens; its stride and channels."""
    if size["name"] == "vit":
        return size["img_size"], _grid(size), _grid(size), size["patch_size"], size["embed_dim"]
    if size.get("own"):
        return size["img_size"], size["grid"], size["grid"] // 8, 32, 8 * size["embed_dim"]
    return 192, GRID, 6, 32, 8 * size["embed_dim"]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _moved(traffic: tuple[tuple[int, int, int], tuple[int, int, int]]) -> tuple[int, int]:
    return sum(traffic[0][:2]), sum(traffic[1][:2])


def _window_attention(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    edge, heads, cosine = size["window_size"], size["num_heads"][0], size["name"] == "swinv2"
    grid, window = _grid(size), (edge, edge)
    shift = edge // 2 if edge < grid else 0
    qkv = normal(batch, grid, grid, 3 * size["embed_dim"])
    arguments = {"qkv": qkv, "bias": normal(heads, edge**2, edge**2), "num_heads": heads, "window_size": window,
                 "shift_size": (shift, shift)}  # fmt: skip
    if cosine:
        arguments["logit_scale"] = 2 + normal(heads, scale=0.1)
    moved = _moved(window_attention_traffic(qkv.shape, heads, window, itemsize=itemsize))
    return Work(arguments, ("qkv",), ("qkv", "bias", "logit_scale")[: 2 + cosine], *moved)


def _residual_norm(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    c, order = size["embed_dim"], "post" if size["name"] == "swinv2" else "pre"
    shape = (*_tokens(size, batch), c)
    arguments = {"residual": normal(*shape), "branch": normal(*shape, scale=0.5), "order": order,
                 "weight": 1 + normal(c, scale=0.1), "bias": normal(c)}  # fmt: skip
    moved = _moved(residual_norm_traffic(math.prod(shape[:-1]), c, order, itemsize=4, branch_itemsize=itemsize,
                                         out_itemsize=4))  # fmt: skip
    return Work(arguments, ("branch",), ("residual", "branch", "weight", "bias"), *moved)


def _patch_merge(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    x = normal(batch, _grid(size), _grid(size), size["embed_dim"])
    moved = _moved(patch_merge_traffic(tuple(x.shape), norm=False, itemsize=itemsize, out_itemsize=itemsize))
    return Work({"x": x}, ("x",), ("x",), *moved)


def _gelu(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    rows, c = math.prod(_tokens(size, batch)), 4 * size["embed_dim"]
    return Work({"x": normal(rows, c), "bias": normal(c)}, ("x",), ("x", "bias"),
                *_moved(gelu_traffic(rows, c, itemsize=itemsize)))  # fmt: skip


def _mlp(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    rows, c = math.prod(_tokens(size, batch)), size["embed_dim"]
    arguments = {"x": normal(rows, c), "weight1": normal(4 * c, c, scale=c**-0.5), "bias1": normal(4 * c),
                 "weight2": normal(c, 4 * c, scale=c**-0.5), "bias2": normal(c)}  # fmt: skip
    return Work(arguments, ("x",), tuple(arguments), *_moved(mlp_traffic(rows, c, 4 * c, itemsize=itemsize)))


def _position_bias(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    """All blocks of the deepest stage; there is no batch, and parameters are float32 in every precision."""
    depth, edge = max(size["depths"]), size["window_size"]
    heads, rows = size["num_heads"][size["depths"].index(depth)], (2 * edge - 1) ** 2
    window, mlp = (edge, edge), size["name"] == "swinv2"
    coords = [relative_coords_table(window, window)] if mlp else None
    plan, blocks = bias_plan([relative_position_index(window)], [depth], [heads], [rows], coords)
    shapes = {"weight1": (512, 2), "bias1": (512,), "weight2": (heads, 512)} if mlp else {"table": (rows, heads)}
    params = {n: normal(depth, *shape, scale=0.05 if n == "weight2" else 1.0) for n, shape in shapes.items()}
    moved = _moved(position_bias_traffic(depth, heads, rows, edge**4, 512 if mlp else 0))
    return Work({**plan._asdict(), "blocks": blocks, **params}, (), tuple(params), *moved)


def position_bias(impl: str, blocks: Any, rows: Tensor, order: Tensor, start: Tensor, coords: Tensor, layout: Tensor,
                  **params: Tensor) -> list[Tensor]:
    own = list(zip(*(p.unbind(0) for p in params.values()), strict=True))
    return fk.position_bias(BiasPlan(rows, order, start, coords, layout), blocks, own, impl=impl)


def _mask_tokens(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    c, patches = size["embed_dim"], _picture(size)[1]
    tokens = normal(batch, patches, patches, c)
    mask, hidden = _random_mask(batch, patches, patches)
    moved = _moved(mask_tokens_traffic(tuple(tokens.shape), visible=1 - hidden,
                                       itemsize=itemsize, out_itemsize=itemsize))  # fmt: skip
    return Work({"tokens": tokens, "mask": mask, "mask_token": normal(c)}, ("tokens",), ("tokens", "mask_token"),
                *moved)  # fmt: skip


def _random_mask(batch: int, patches: int, last: int) -> tuple[Tensor, float]:
    """(A mask of patches, share of the last map's tokens that hold a masked one), known of fake tensors too."""
    mask, each = np.random.default_rng(0).random((batch, patches, patches)) < 0.6, patches // last
    share = mask.reshape(batch, last, each, last, each).any((2, 4)).mean()
    return torch.tensor(mask.tolist()), float(share)


def _masked_l1(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    edge, patches, last, stride, _ = _picture(size)
    mask, hit = _random_mask(batch, patches, last)
    arguments = {"prediction": normal(batch, last, last, 3 * stride**2), "target": normal(batch, 3, edge, edge),
                 "mask": mask, "stride": stride}  # fmt: skip
    moved = _moved(masked_l1_traffic((batch, last, last), 3, stride, mask.numel(), hit=hit, itemsize=itemsize))
    return Work(arguments, ("prediction",), ("prediction",), *moved)


def _linear_masked_l1(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    edge, patches, last, stride, c = _picture(size)
    mask, hit = _random_mask(batch, patches, last)
    pixels = 3 * stride**2
    arguments = {"tokens": normal(batch, last, last, c), "weight": normal(pixels, c, scale=c**-0.5),
                 "bias": normal(pixels), "target": normal(batch, 3, edge, edge), "mask": mask,
                 "stride": stride}  # fmt: skip
    moved = _moved(linear_traffic((batch, last, last, 3), c, stride, mask.numel(), masked=hit, itemsize=itemsize))
    return Work(arguments, ("tokens",), ("tokens", "weight", "bias"), *moved, together=True)


def _local_norm_target(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    edge = _picture(size)[0]
    images = normal(batch, 3, edge, edge)
    return Work({"images": images, "kernel_size": 47}, (), (), sum(local_norm_traffic(tuple(images.shape))[:2]))


def _distillation(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    """iBOT's patches: of the two global crops of an image 57 are masked in the mean; no encoder has a say in it."""
    rows, codes = 57 * batch, 8192
    arguments = {"student": normal(rows, codes), "teacher": -normal(rows, codes), "centre": normal(codes, scale=0.1),
                 "student_temp": 0.1, "teacher_temp": 0.05, "weight": torch.full((rows,), 1 / rows)}  # fmt: skip
    moved = _moved(distillation_traffic(1, 1, rows, codes, itemsize=itemsize, teacher_itemsize=itemsize))
    return Work(arguments, ("student", "teacher"), ("student",), *moved, together=True)


def _unshuffle(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    """MAE's decoder at 224 px: 49 of 196 patches kept, 512 channels; no encoder has a say in it."""
    kept, patches, c = 49, 196, 512
    order = torch.rand(batch, patches, generator=torch.Generator().manual_seed(0)).argsort(1)
    arguments = {"tokens": normal(batch, 1 + kept, c), "places": torch.where(order < kept, order, -1),
                 "mask_token": normal(c), "pos_embed": normal(1 + patches, c)}  # fmt: skip
    moved = _moved(unshuffle_traffic((batch, 1 + kept, c), patches, itemsize=itemsize, out_itemsize=4))
    return Work(arguments, ("tokens",), ("tokens", "mask_token"), *moved)


def _visible_attention(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    """Two of five units of 8 × 8 tokens, the columns of an image of which the rest is hidden; no shift."""
    grid, edge, heads = _grid(size), size["window_size"], size["num_heads"][0]
    unit = math.gcd(grid, 8)
    order = torch.rand(batch, (grid // unit) ** 2, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    shown = order.shape[1] * 2 // 5
    inside = torch.arange(unit**2).view(1, 1, unit, 1, unit)
    held = order.view(batch, grid // unit, 1, grid // unit, 1)
    held = torch.where(held < shown, held * unit**2 + inside, -1).view(batch, grid // edge, edge, grid // edge, edge)
    held = held.transpose(2, 3).reshape(batch, -1, edge**2)
    places = (held == -1).to(torch.uint8).argsort(dim=2, stable=True)
    arguments = {"qkv": normal(batch, shown * unit**2, 3 * size["embed_dim"]), "bias": normal(heads, edge**2, edge**2),
                 "slots": held.gather(2, places), "places": places, "num_heads": heads}  # fmt: skip
    if cosine := size["name"] == "swinv2":
        arguments["logit_scale"] = 2 + normal(heads, scale=0.1)
    moved = _moved(visible_attention_traffic(arguments["qkv"].shape, held.shape, heads, itemsize=itemsize))
    return Work(arguments, ("qkv",), ("qkv", "bias", "logit_scale")[: 2 + cosine], *moved)


WORKS: dict[str, Callable[[dict[str, Any], int, int], Work]] = {
    "window_attention": _window_attention, "residual_norm": _residual_norm, "mlp": _mlp, "gelu": _gelu,
    "patch_merge": _patch_merge, "mask_tokens": _mask_tokens, "masked_l1": _masked_l1,
    "linear_masked_l1": _linear_masked_l1, "local_norm_target": _local_norm_target, "position_bias": _position_bias,
    "distillation": _distillation, "unshuffle": _unshuffle, "visible_attention": _visible_attention,
}  # fmt: skip
