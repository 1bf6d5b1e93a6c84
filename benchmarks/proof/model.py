"""The models, images and steps of the proof's parts: ours by ``impl``, timm's, and our engine's whole step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline import timm_objective
from benchmarks.train_step import CLIP, LR, WEIGHT_DECAY, Provider, awake, engine_step, plain_step
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.models import expand_size
from fastmim.objectives import create_objective

TARGET, TINY_TARGET = 47, 13
"""Pixels of the normalised target's window: as published for SwinV2, and on tiny images."""
_TINY = {"img_size": 64, "embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}


def encoder(size: str, tiny: bool = False, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of an encoder without stochastic depth; ``tiny``: its family on five blocks and 64 px."""
    return expand_size({"name": size, "drop_path_rate": 0.0, **(_TINY if tiny else changes)})


def kernels_of(device: str) -> str:
    """What ``auto`` means there: named, so that no part waits for the self-test, which is a part of its own."""
    return "triton" if device == "cuda" else "torch"


def norm_target(kwargs: dict[str, Any]) -> int:
    """The published pretraining of SwinV2 normalises its target, Swin's does not."""
    window = TINY_TARGET if kwargs["img_size"] == _TINY["img_size"] else TARGET
    return window if kwargs["name"] == "swinv2" else 0


def built(kwargs: dict[str, Any], impl: str) -> Any:
    """Our SimMIM on torch's default device: the same weights in every call, whatever the implementation."""
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder=kwargs, impl=impl, norm_target=norm_target(kwargs))
    return awake(objective).train()


def ours(kwargs: dict[str, Any], impl: str, device: str) -> Any:
    """:func:`built`, on a device."""
    return built(kwargs, impl).to(device)


def timms(kwargs: dict[str, Any], device: str) -> nn.Module:
    """SimMIM on timm's encoder, of Microsoft's shape, with the weights of :func:`ours`."""
    return timm_objective(kwargs, norm_target(kwargs), ours(kwargs, "torch", "cpu")).to(device).train()


def engine(objective: Any, dtype: str) -> LocalEngine:
    """What ``train`` makes for one process, with the benchmarks' settings of the optimiser."""
    optimizer = build_optimizer("adamw", param_groups(objective, WEIGHT_DECAY), LR)
    return LocalEngine(objective, optimizer, clip_grad=CLIP, precision=dtype)


def trained(name: str, objective: Any, dtype: str) -> Provider:
    """The step that a run takes."""
    return engine_step(name, objective, engine(objective, dtype))


def plain(name: str, module: nn.Module, device: str, dtype: str, *, compiled: str = "", **options: Any) -> Provider:
    """The step as references write it; ``compiled`` names a backend of ``torch.compile``."""
    call = torch.compile(module, dynamic=False, backend=compiled) if compiled else module
    return plain_step(name, module, call, device=device, dtype=dtype, **options)


def pictures(count: int, size: tuple[int, int], device: str, seed: int = 0) -> Tensor:
    """(count, 3, H, W) float images that a model can learn: smooth, so that what is hidden follows from its rim."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).to(device)


def batch(objective: Any, count: int, device: str, step: int = 0) -> tuple[Tensor, Tensor]:
    """Images and mask of one step; every step has its own."""
    ids = torch.arange(step * count, (step + 1) * count, device=device)
    return pictures(count, objective.img_size, device, step), objective.random_mask(ids)


def exact_float32() -> None:
    """float32 products in float32: the convolutions of cuDNN would take TF32 by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def bits_apart(first: list[Tensor], second: list[Tensor]) -> int:
    """How many tensors differ in any bit, NaN being equal to the same NaN."""
    return sum(not torch.equal(_bytes(a), _bytes(b)) for a, b in zip(first, second, strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
