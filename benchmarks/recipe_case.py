"""A step of a published recipe of iBOT or MAE as a case beside SimMIM's, without what would hide a wrong loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import Case
from fastmim.config import Config, load_config
from fastmim.engine.build import encoder_arguments

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CASES = {
    f"{task}_{recipe}": f"{task}/{recipe}"
    for task, recipes in {
        "ibot": ("vit_small", "vit_base", "demo"), "mae": ("vit_base", "vit_large", "vit_huge", "swin_base", "demo"),
    }.items()
    for recipe in recipes
}  # fmt: skip
"""Case → its recipe."""
_STEADY = ("model.drop_path_rate=0", "optim.policy=parity", "train.global_batch_size=null")
# iBOT's past the warm-up of the temperatures and the frozen epoch; colours are changed before the step that is timed.
STEADY = {
    "ibot": (*_STEADY, "objective.augment=false", "objective.freeze_last_layer=0",
             "objective.warmup_teacher_temp_epochs=0"),
    "mae": _STEADY,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RecipeCase(Case):
    """A :class:`.Case` of :data:`CASES`; ``overrides`` are keys of the config."""

    def config(self, **efficiency: Any) -> Config:
        """See :meth:`.Case.config`."""
        keys = {"train.micro_batch_size": self.batch, "efficiency.precision": self.dtype, **dict(self.overrides)}
        keys |= {} if self.img_size is None else {"model.img_size": self.img_size}
        keys |= {f"efficiency.{key}": value for key, value in efficiency.items()}
        given = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
        recipe = CASES[self.name]
        return load_config(CONFIGS / f"{recipe}.yaml", [*STEADY[recipe.partition("/")[0]], *given])

    def encoder(self) -> dict[str, Any]:
        """See :meth:`.Case.encoder`."""
        return encoder_arguments(self.config())

    def shares(self) -> dict[str, float]:
        """See :meth:`.Case.shares`."""
        found: dict[str, float] = self.build().shares()
        return found

    def inputs(self, source: Any) -> tuple[Any, Tensor]:
        """Normalised images, or of iBOT global crops (2, B, C, H, W) and local ones; and the masks."""
        images, mask = source.example(self.batch)
        mask = mask.to(torch.device(self.device))
        if isinstance(images, Tensor):
            return source.normalise(images).to(self.device), mask
        crops = [source.normalise(view.flatten(0, 1)).unflatten(0, view.shape[:2]) for view in images]
        return tuple(view.to(self.device) for view in crops), mask


def make_case(name: str, *args: Any) -> Case:
    """A case by its name, with the further arguments of :class:`.Case`."""
    return (RecipeCase if name in CASES else Case)(name, *args)
