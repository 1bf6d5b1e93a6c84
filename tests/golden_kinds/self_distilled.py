"""Whole iBOT and DINO runs, and iBOT's loss alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import fastmim_kernels as fk
from fastmim import create_objective, load_config
from fastmim.config import Config
from fastmim.engine.build import make_engine, make_schedule, make_weight_decay
from fastmim.engine.distributed import World
from fastmim.engine.loop import train_step
from fastmim.interop import load_reference
from fastmim.interop.self_distilled import own_name
from fastmim.objectives.block_masks import row_weights
from fastmim.objectives.self_distillation import Centre, warm_temperature

from .common import Errors, encoder_of, ends, overrides, relative, weights


class Batches:
    """The crops and masks of an iBOT file, as a loader and an objective would give them."""

    def __init__(self, meta: Mapping[str, Any], masks: torch.Tensor, objective: Any) -> None:
        rng = np.random.default_rng(meta["seed"])
        count, batch, size, small = meta["steps"], meta["batch"], meta["img_size"], meta["local_size"]
        globals_ = rng.standard_normal((count, meta["n_global"], batch, 3, size, size))
        offset = rng.standard_normal((count, 1, batch, 3, 1, 1))
        local = rng.standard_normal((count, meta["n_local"], batch, 3, small, small))
        views = [torch.from_numpy((0.7 * crops + offset).astype(np.float32)) for crops in (globals_, local)]
        self.images, self.step = list(zip(*views, strict=True)), 0
        objective.random_mask = lambda ids, seed, epoch: masks[self.step]

    def __iter__(self) -> Any:
        for step, images in enumerate(self.images):
            self.step = step
            yield 0, _Batch(images)


class _Batch:
    sample_ids = None

    def __init__(self, images: Any) -> None:
        self.images = images


def ibot_config(meta: Mapping[str, Any], dino: bool) -> Config:
    """The config of the file's run; sizes of the model are left to the encoder's arguments."""
    keys = ("out_dim", "hidden_dim", "bottleneck_dim", "norm_last_layer", "local_size", "student_temp", "teacher_temp",
            "warmup_teacher_temp", "warmup_teacher_temp_epochs", "momentum_teacher", "freeze_last_layer")  # fmt: skip
    task = {key: meta[key] for key in keys} | dict(
        name="dino" if dino else "ibot",
        local_crops=meta["n_local"],
        augment=False,
        centre_momentum=meta["center_momentum"],
    )
    if not dino:
        task |= dict(
            teacher_patch_temp=meta["teacher_patch_temp"],
            warmup_teacher_patch_temp=meta["warmup_teacher_patch_temp"],
            mask_start_epoch=meta["pred_start_epoch"],
            class_weight=meta["lambda1"],
            patch_weight=meta["lambda2"],
            **{key: meta[key] for key in ("shared_head", "shared_head_teacher", "patch_out_dim") if key in meta},
        )
    optim = dict(
        lr=meta["base_lr"], lr_batch=None, warmup_lr=0.0, min_lr=meta["min_lr"], clip_grad=meta["clip_grad"],
        warmup_epochs=meta["warmup_epochs"], warmup_inclusive=True, clip_each=True, schedule_lag=False,
        weight_decay=meta["weight_decay"], weight_decay_end=meta["weight_decay_end"], policy="parity",
    )  # fmt: skip
    model = encoder_of(meta) | dict(policy="default") if meta["arch"] != "vit" else encoder_of(meta)
    plain_vit = dict(key_bias=True, abs_pos_embed=True, init="timm")
    own = plain_vit if meta["arch"] == "vit" else dict(norm_eps=meta["ln_eps"])
    train = dict(epochs=meta["epochs"], micro_batch_size=meta["batch"])
    return load_config(None, overrides(model=model | own, objective=task, optim=optim, train=train))


def ibot(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    errors = {}
    for dino, prefix in ((False, ""), (True, "dino.")):
        if f"{prefix}losses" in tensors:
            found = ibot_run(meta, tensors, impl, dino)
            errors |= {f"{prefix}{name}": value for name, value in found.items()}
    return errors


def ibot_run(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str, dino: bool) -> Errors:
    cfg, per_epoch, prefix = ibot_config(meta, dino), meta["iters_per_epoch"], "dino." if dino else ""
    task = {key: value for key, value in cfg.objective.arguments().items()}
    objective = create_objective(cfg.objective.name, encoder=cfg.model.encoder_kwargs(), impl=impl, **task)
    load_reference(objective, weights(tensors))
    world = World(0, 1, 0, torch.device("cpu"))
    engine = make_engine(cfg, objective, world)
    schedule = make_schedule(cfg, per_epoch, meta["batch"])
    decay = make_weight_decay(cfg, schedule.total_steps)
    masks = torch.zeros_like(tensors["masks"]) if dino else tensors["masks"]
    batches, rows, norms = iter(Batches(meta, masks, objective)), [], []
    lengths = dict(total=schedule.total_steps, steps_per_epoch=per_epoch)
    for step in range(meta["steps"]):
        train_step(engine, batches, lr=schedule(step), weight_decay=decay(step), seed=0, **lengths)
        row = engine.read()
        rows.append([row["cls"], row.get("patch", 0.0), row["loss"]])
        norms.append(row["grad_norm"])
    errors = {
        "losses": (relative(rows, tensors[f"{prefix}losses"]), 1e-5),
        "norms": (relative(norms, tensors[f"{prefix}grad_norms"]), 1e-4),
        "centre": (relative(objective.centre.value, tensors[f"{prefix}center"]), 1e-4),
    }
    if not dino:
        errors["patch centre"] = (relative(objective.patch_centre.value, tensors["center2"]), 1e-4)
    for who, inside in (("student", ""), ("teacher", "teacher.")):
        own = {name.removeprefix(inside): p for name, p in objective.named_parameters() if name.startswith(inside)}
        errors[f"{who}'s end"] = (ends(own, tensors, f"{prefix}{who}_end.", own_name), 1e-4)
    return errors


def ibot_loss(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Loss, its gradients and the centres, of logits that are given."""
    rng, batch, edge = np.random.default_rng(meta["seed"]), meta["batch"], math.isqrt(meta["num_patches"])
    temps = {name: float(value) for name, value in re.findall(r"(\w+) (\d[\d.]*)", meta["temps"])}
    warm_up, momentum = int(temps["warmup_epochs"]), temps["momentum"]
    centre, patch_centre = Centre((1, meta["out_dim"]), momentum), Centre((1, 1, meta["patch_out_dim"]), momentum)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    rows = []
    for epoch in range(meta["steps"]):
        sizes = (2 * batch, meta["out_dim"]), (2 * batch, edge**2, meta["patch_out_dim"])
        student, student_patch, teacher, teacher_patch = (draw(*shape) for shape in sizes * 2)
        local = draw(meta["local_crops"] * batch, meta["out_dim"])
        mask = torch.from_numpy(np.concatenate([rng.random((batch, edge, edge)) < 0.3 for _ in range(2)])).flatten(1)
        student.requires_grad_()
        student_patch.requires_grad_()
        heat = [
            warm_temperature(epoch, start=temps[f"warmup_{name}"], end=temps[name], warm_up=warm_up,
                             delay=delay) for name, delay in (("teacher_temp", 0),
                                                              ("teacher_patch_temp", meta["mim_start_epoch"]))
        ]  # fmt: skip
        crops = torch.cat((student, local)).unflatten(0, (-1, batch)), teacher.unflatten(0, (2, batch))
        how = [dict(student_temp=temps["student_temp"], teacher_temp=value, impl=impl) for value in heat]
        cls = fk.distillation(*crops, centre.value, pairs="views", **how[0])
        weight = row_weights(mask) / len(mask)
        patch = fk.distillation(student_patch, teacher_patch, patch_centre.value, weight=weight, **how[1])
        loss = meta["lambda1"] * cls + meta["lambda2"] * patch
        loss.backward()
        rows.append(
            [cls.item(), patch.item(), loss.item(), student.grad.norm().item(), student_patch.grad.norm().item()]
        )
        centre.add(teacher)
        patch_centre.add(teacher_patch)
        centre.move()
        patch_centre.move()
    return {
        "losses and gradients": (relative(rows, tensors["rows"]), 1e-5),
        "centre": (relative(centre.value, tensors["center"]), 1e-5),
        "patch centre": (relative(patch_centre.value, tensors["center2"]), 1e-5),
    }
