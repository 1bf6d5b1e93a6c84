"""Arguments and closed-form bytes of every op at the size of an encoder, for ``bench_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim.models.layers import relative_position_index
from fastmim.models.swin_shared import relative_coords_table
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


def _grid(size: dict[str, Any]) -> int:
    return size.get("grid", GRID)


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
    shape = (batch, _grid(size), _grid(size), c)
    arguments = {"residual": normal(*shape), "branch": normal(*shape, scale=0.5), "order": order,
                 "weight": 1 + normal(c, scale=0.1), "bias": normal(c)}  # fmt: skip
    moved = _moved(residual_norm_traffic(batch * _grid(size) ** 2, c, order, itemsize=4, branch_itemsize=itemsize,
                                         out_itemsize=4))  # fmt: skip
    return Work(arguments, ("branch",), ("residual", "branch", "weight", "bias"), *moved)


def _patch_merge(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    x = normal(batch, _grid(size), _grid(size), size["embed_dim"])
    moved = _moved(patch_merge_traffic(tuple(x.shape), norm=False, itemsize=itemsize, out_itemsize=itemsize))
    return Work({"x": x}, ("x",), ("x",), *moved)


def _gelu(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    rows, c = batch * _grid(size) ** 2, 4 * size["embed_dim"]
    return Work({"x": normal(rows, c), "bias": normal(c)}, ("x",), ("x", "bias"),
                *_moved(gelu_traffic(rows, c, itemsize=itemsize)))  # fmt: skip


def _mlp(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    rows, c = batch * _grid(size) ** 2, size["embed_dim"]
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
    c = size["embed_dim"]
    tokens = normal(batch, GRID, GRID, c)
    mask = torch.rand(tokens.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.6
    moved = _moved(mask_tokens_traffic(tuple(tokens.shape), visible=1 - mask.double().mean().item(),
                                       itemsize=itemsize, out_itemsize=itemsize))  # fmt: skip
    return Work({"tokens": tokens, "mask": mask, "mask_token": normal(c)}, ("tokens",), ("tokens", "mask_token"),
                *moved)  # fmt: skip


def _random_mask(batch: int) -> tuple[Tensor, float]:
    """(A mask of patches, share of the 6 × 6 tokens that hold a masked one)."""
    mask = torch.rand((batch, GRID, GRID), generator=torch.Generator().manual_seed(0)) < 0.6
    return mask, mask.view(batch, 6, GRID // 6, 6, GRID // 6).any(4).any(2).double().mean().item()


def _masked_l1(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    mask, hit = _random_mask(batch)
    arguments = {"prediction": normal(batch, 6, 6, 3072), "target": normal(batch, 3, 192, 192), "mask": mask,
                 "stride": 32}  # fmt: skip
    moved = _moved(masked_l1_traffic((batch, 6, 6), 3, 32, mask.numel(), hit=hit, itemsize=itemsize))
    return Work(arguments, ("prediction",), ("prediction",), *moved)


def _linear_masked_l1(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    c = 8 * size["embed_dim"]
    mask, hit = _random_mask(batch)
    arguments = {"tokens": normal(batch, 6, 6, c), "weight": normal(3072, c, scale=c**-0.5), "bias": normal(3072),
                 "target": normal(batch, 3, 192, 192), "mask": mask, "stride": 32}  # fmt: skip
    moved = _moved(linear_traffic((batch, 6, 6, 3), c, 32, mask.numel(), masked=hit, itemsize=itemsize))
    return Work(arguments, ("tokens",), ("tokens", "weight", "bias"), *moved, together=True)


def _local_norm_target(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    images = normal(batch, 3, 192, 192)
    return Work({"images": images, "kernel_size": 47}, (), (), sum(local_norm_traffic(tuple(images.shape))[:2]))


WORKS: dict[str, Callable[[dict[str, Any], int, int], Work]] = {
    "window_attention": _window_attention, "residual_norm": _residual_norm, "mlp": _mlp, "gelu": _gelu,
    "patch_merge": _patch_merge, "mask_tokens": _mask_tokens, "masked_l1": _masked_l1,
    "linear_masked_l1": _linear_masked_l1, "local_norm_target": _local_norm_target, "position_bias": _position_bias,
}  # fmt: skip
