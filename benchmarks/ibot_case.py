"""iBOT's step as a case beside SimMIM's: a published recipe, with what would hide a wrong loss switched off."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import Case
from fastmim.config import Config, load_config
from fastmim.engine.build import encoder_arguments

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "ibot"
CASES = {"ibot_vit_small": "vit_small", "ibot_vit_base": "vit_base", "ibot_demo": "demo"}
"""Case → its recipe."""
# Past the warm-up of the temperatures and the frozen epoch; colours are changed before the step that is timed.
STEADY = ("model.drop_path_rate=0", "objective.augment=false", "objective.freeze_last_layer=0",
          "objective.warmup_teacher_temp_epochs=0", "optim.policy=parity", "train.global_batch_size=null")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class IbotCase(Case):
    """A :class:`.Case` of :data:`CASES`; ``overrides`` are keys of the config."""

    def config(self, **efficiency: Any) -> Config:
        """See :meth:`.Case.config`."""
        keys = {"train.micro_batch_size": self.batch, "efficiency.precision": self.dtype, **dict(self.overrides)}
        keys |= {} if self.img_size is None else {"model.img_size": self.img_size}
        keys |= {f"efficiency.{key}": value for key, value in efficiency.items()}
        given = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
        return load_config(CONFIGS / f"{CASES[self.name]}.yaml", [*STEADY, *given])

    def encoder(self) -> dict[str, Any]:
        """See :meth:`.Case.encoder`."""
        return encoder_arguments(self.config())

    def inputs(self, source: Any) -> tuple[tuple[Tensor, ...], Tensor]:  # type: ignore[override]
        """Normalised global crops (2, B, C, H, W) and local ones, and the masks of the global ones."""
        images, mask = source.example(self.batch)
        crops = [source.normalise(view.flatten(0, 1)).unflatten(0, view.shape[:2]) for view in images]
        return tuple(view.to(self.device) for view in crops), mask.to(torch.device(self.device))


def make_case(name: str, *args: Any) -> Case:
    """A case by its name, with the further arguments of :class:`.Case`."""
    return (IbotCase if name in CASES else Case)(name, *args)
