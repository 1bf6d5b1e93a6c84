"""Schedules by step, and statistics of block-wise masks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fastmim.engine.base import scaled_lr
from fastmim.objectives.block_masks import beit_mask, ibot_mask
from fastmim.objectives.schedule import Schedule
from fastmim.objectives.self_distillation import warm_temperature

from .common import Errors, relative


def schedules(table: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Rates, momenta, weight decay and temperatures of every recipe in the table."""
    found: Errors = {}
    for family, columns in table.items():
        if not isinstance(columns, dict):
            continue
        for name, values in columns.items():
            if not isinstance(values, list):
                continue
            own = rates(table, family, columns, name) if name.startswith("lr") else curve(table, name)
            key = f"{family} {name if ' lr' in name or 'scale' in name else name.split()[0]}"
            found[key] = (relative(own, values), 1e-9)
    return found


RATES: dict[str, dict[str, Any]] = {
    "ibot": dict(warmup_inclusive=True),
    "beit": dict(warmup_inclusive=True),
    "mae": {},
    "moco_v3": dict(min_lr=0.0),
    "simmim_finetune (microsoft/SimMIM)": dict(cosine_after_warmup=False, lag=True),
    "simmim_finetune (microsoft/Swin-Transformer)": dict(lag=True),
}
"""How each recipe's rate differs from a linear warm-up and a cosine to the end."""


def rates(table: Mapping[str, Any], family: str, columns: Mapping[str, Any], name: str) -> list[float]:
    """Of the group whose scale the column's name says; SimMIM's fine-tuning scales the peak alone."""
    per_epoch = table["iters_per_epoch"]
    how: dict[str, Any] = dict(
        name="cosine",
        base_lr=table["base_lr"],
        min_lr=table["min_lr"],
        warmup_lr=columns.get("warmup_lr", 0.0),
        warmup_steps=table["warmup_epochs"] * per_epoch,
        total_steps=table["epochs"] * per_epoch,
    )
    schedule = Schedule(**how | RATES[family])
    said = re.search(r"lr_scale ([\d.e-]+)", name)
    group = {"lr_scale": float(said[1]) if said else 1.0, "scale_peak_only": family.startswith("simmim")}
    return [scaled_lr(group, schedule(step), schedule.floor(step)) for step in range(schedule.total_steps)]


def curve(table: Mapping[str, Any], name: str) -> list[float]:
    """What follows a cosine by step, or a temperature by epoch; the name says from where to where."""
    numbers = [float(word) for word in name.replace(",", "").split() if word.replace(".", "").isdigit()]
    if "temp" in name:
        start, end, warm_up, *delay = numbers
        how = dict(start=start, end=end, warm_up=int(warm_up), delay=int(delay[0]) if delay else 0)
        return [warm_temperature(epoch, **how) for epoch in range(table["epochs"])]
    total = table["epochs"] * table["iters_per_epoch"]
    cosine = Schedule(name="cosine", base_lr=numbers[0], min_lr=numbers[1], total_steps=total)
    return [cosine(step) for step in range(total)]


def block_masks(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Statistics in standard errors of the difference: share of unmasked ones, mean count, probability of each cell."""
    ids, errors = torch.arange(4000), {}
    for name, stats in meta["stats"].items():
        mask = masks_of(name, stats["grid"], ids).double()
        count, theirs = mask.sum((1, 2)), stats["masks"] * (1 - stats["share_unmasked"])
        some, shown = mask[count > 0], count[count > 0]
        both = (1 / len(some) + 1 / theirs) ** 0.5
        half = (0.25 / len(ids) + 0.25 / stats["masks"]) ** 0.5
        share = ((count == 0).double().mean() - stats["share_unmasked"]) / half
        mean = (shown.mean() - stats["count_mean_masked"]) / max(stats["count_std_masked"] * both, 1e-12)
        probability = tensors[f"probability.{name}"].double()
        cells = (some.mean(0) - probability) / ((probability * (1 - probability)).sqrt() * both).clamp(min=1e-12)
        errors[name] = (float(torch.stack([share.abs(), mean.abs()]).max()), 4.0)
        errors[f"{name} cells"] = (float(cells.abs().max()), 5.0)
    return errors


def masks_of(name: str, grid: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Own masks of a case, whose name says its algorithm and numbers."""
    size = (grid[0], grid[1])
    if beit := re.fullmatch(r"beit_\d+x\d+_(\d+)_min(\d+)", name):
        return beit_mask(ids, grid=size, count=int(beit[1]), smallest=int(beit[2]))
    if fixed := re.search(r"_ratio([\d.]+)_fixed", name):
        return ibot_mask(ids, grid=size, ratios=((float(fixed[1]),) * 2,))
    if spread := re.search(r"_rand_ratio_0_or_([\d.]+)pm([\d.]+)", name):
        middle, half = float(spread[1]), float(spread[2])
        ratios = ((0.0, 0.0), (middle - half, middle + half))
        return ibot_mask(ids, grid=size, ratios=ratios, shape="random")
    return ibot_mask(ids, grid=size)
