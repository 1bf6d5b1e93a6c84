"""Schedules by step, and statistics of block-wise masks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fastmim.objectives.block_masks import beit_mask, ibot_mask
from fastmim.objectives.schedule import Schedule
from fastmim.objectives.self_distillation import warm_temperature

from .common import Errors, relative


def schedules(table: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Those of iBOT and BEiT; of the objectives that are not built yet there is nothing to compare."""
    length, per_epoch = table["epochs"] * table["iters_per_epoch"], table["iters_per_epoch"]
    found = {}
    rate = Schedule(name="cosine", base_lr=table["base_lr"], min_lr=table["min_lr"], total_steps=length,
                    warmup_steps=table["warmup_epochs"] * per_epoch, warmup_inclusive=True)  # fmt: skip
    if "beit" in table:
        found["beit lr"] = (relative([rate(step) for step in range(length)], table["beit"]["lr"]), 1e-9)
    for name, values in table["ibot"].items():
        numbers = [float(word) for word in name.replace(",", "").split() if word.replace(".", "").isdigit()]
        if name == "lr":
            own = [rate(step) for step in range(length)]
        elif "temp" in name:
            start, end, warm_up, *delay = numbers
            how = dict(start=start, end=end, warm_up=int(warm_up), delay=int(delay[0]) if delay else 0)
            own = [warm_temperature(epoch, **how) for epoch in range(table["epochs"])]
        else:
            curve = Schedule(name="cosine", base_lr=numbers[0], min_lr=numbers[1], total_steps=length)
            own = [curve(step) for step in range(length)]
        found[f"ibot {name.split()[0]}"] = (relative(own, values), 1e-9)
    return found


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
