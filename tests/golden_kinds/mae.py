"""Whole MAE runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastmim import create_objective
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.interop import load_reference
from fastmim.interop.mae import own_name, save_mae

from .common import Errors, encoder_of, ends, relative, steps, weights


def build_mae(meta: Mapping[str, Any], impl: str, channels: int = 3) -> Any:
    encoder = encoder_of({"arch": "vit", **meta}, key_bias=True, abs_pos_embed="sincos", init="mae", in_chans=channels)
    names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss", "mask_ratio")
    return create_objective("mae", encoder=encoder, impl=impl, **{name: meta[name] for name in names if name in meta})


def mae(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    channels = tensors["param.patch_embed.proj.weight"].shape[1]
    objective = build_mae(meta, impl, channels)
    load_reference(objective, weights(tensors))
    size = meta["img_size"] if isinstance(meta["img_size"], list) else [meta["img_size"]] * 2
    shape = (meta["steps"], meta["batch"], channels, *size)
    images = torch.from_numpy(np.random.default_rng(meta["seed"]).standard_normal(shape).astype(np.float32))
    masks = masks_of(tensors["noise"], meta["mask_ratio"]).unflatten(2, objective.encoder.grid)
    found = first_results(objective, images[0], masks[0], tensors)
    optimiser, clip = optimiser_of(meta["optimizer"], objective)
    losses, norms = steps(LocalEngine(objective, optimiser, clip_grad=clip), zip(images, masks, strict=True))
    found["losses"] = (relative([row["loss"] for row in losses], tensors["losses"]), 1e-5)
    found["norms"] = (relative(norms, tensors["grad_norms"]), 1e-4)
    own = {own_name(name): tensor for name, tensor in save_mae(objective)["model"].items()}
    if any(name.startswith("end.") for name in tensors):
        found["ends"] = (ends(own, tensors, "end.", own_name), 1e-4)
    return found


def first_results(objective: Any, images: torch.Tensor, mask: torch.Tensor, tensors: Mapping[str, torch.Tensor]
                  ) -> Errors:  # fmt: skip
    """Mask and prediction of the first image."""
    found: Errors = {}
    if "mask0" in tensors:
        found["mask"] = (float((mask.flatten(1) != tensors["mask0"].bool()).sum()), 0.0)
    if "pred0" in tensors:
        image, p = objective.reconstruct(images, mask), objective.stride
        rows, columns = objective.encoder.grid
        theirs = image.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        shown = theirs.flatten(1, 2)[: len(tensors["pred0"])]
        found["prediction"] = (relative(shown, tensors["pred0"]), 1e-4)
    return found


def masks_of(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """(…, L) bool of what the smallest int(L·(1 − ratio)) numbers leave hidden."""
    kept = int(noise.shape[-1] * (1 - mask_ratio))
    return noise.argsort(-1).argsort(-1) >= kept


def optimiser_of(words: str, objective: Any) -> tuple[torch.optim.Optimizer, float | None]:
    """The optimiser and the largest gradient norm that the file describes in words."""
    values = dict(re.findall(r"\b(lr|wd|eps)=([\d.e-]+)", words))
    betas = re.search(r"betas=\(([\d.]+), ?([\d.]+)\)", words)
    clip = re.search(r"clip\w*[ =]([\d.]+)", words)
    groups = param_groups(objective, float(values.get("wd", 0.05)), policy="parity")
    how = dict(lr=float(values["lr"]), eps=float(values.get("eps", 1e-8)))
    made = build_optimizer("adamw", groups, betas=tuple(map(float, betas.groups())), **how)
    return made, float(clip[1]) if clip else None
