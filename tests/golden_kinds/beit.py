"""Whole BEiT runs with given codes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastmim import create_objective
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import build_optimizer
from fastmim.interop import load_reference
from fastmim.interop.beit import own_name

from .common import Errors, encoder_of, ends, relative, steps, weights


def build_beit(meta: Mapping[str, Any], impl: str) -> Any:
    encoder = encoder_of(
        meta,
        shared_rel_pos_bias=meta["use_shared_rel_pos_bias"],
        rel_pos_bias=meta["use_rel_pos_bias"],
        abs_pos_embed=meta["use_abs_pos_emb"],
        drop_path_rate=meta["drop_path_rate"],
    )
    count = meta["num_mask"]
    most = max(count) if isinstance(count, list) else count
    own: dict[str, Any] = dict(codes=meta["vocab_size"], num_mask=most, min_block=min(meta["min_mask"], most))
    own["jitter"] = 0.4 if meta.get("in_chans", 3) in (1, 3) else 0.0
    return create_objective("beit", encoder=encoder | {"in_chans": meta.get("in_chans", 3)}, impl=impl, **own)


def beit(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    objective = build_beit(meta, impl)
    load_reference(objective, weights(tensors))
    size = to_pair(meta["img_size"])
    shape = (meta["steps"], meta["batch"], meta.get("in_chans", 3), *size)
    images = torch.from_numpy(np.random.default_rng(meta["seed"]).standard_normal(shape).astype(np.float32))
    ids, masks, lr, decay = (tensors[name] for name in ("token_ids", "masks", "lr", "wd"))
    words = {name: value for name, value in re.findall(r"(\w+)=(\([^)]*\)|[\d.e-]+)", meta["optimizer"])}
    betas = [float(word) for word in words.get("betas", "(0.9,0.999)").strip("()").split(",")]
    groups = objective.groups(float(decay[0]), "parity")
    optimiser = build_optimizer("adamw", groups, lr=1e-3, betas=(betas[0], betas[1]), eps=float(words.get("eps", 1e-8)))
    engine = LocalEngine(objective, optimiser, clip_grad=meta["clip_grad"] or None)

    def before(step: int) -> None:
        engine.set_lr(float(lr[step]))
        engine.set_weight_decay(float(decay[step]))

    with torch.no_grad():
        logits = objective.head(objective.encoder(images[0], masks[0])[masks[0]])
    batches = (((pixels, codes), mask) for pixels, codes, mask in zip(images, ids, masks, strict=True))
    rows, norms = steps(engine, batches, before)
    errors = {
        "losses": (relative([row["loss"] for row in rows], tensors["losses"]), 1e-5),
        "norms": (relative(norms, tensors["grad_norms"]), 1e-4),
        "end": (ends(dict(objective.named_parameters()), tensors, "end.", own_name), 1e-4),
        "first logits": (relative(logits[: len(tensors["logits0"])], tensors["logits0"]), 1e-4),
    }
    if "accuracies" in tensors:
        errors["accuracies"] = (relative([row["accuracy"] for row in rows], tensors["accuracies"]), 1e-6)
    return errors


def to_pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
