"""The projects whose checkpoints are known: how their names are told, and how an encoder is written for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import beit, mae, moco, self_distilled
from .encoder_names import DECODER, shift_downsample
from .huggingface import PATCHES, to_huggingface

Tensors = dict[str, Tensor]


class Project(NamedTuple):
    """A way to store an encoder.

    Attributes:
        title: What it is, for a table.
        fits: Whether its code has an encoder of these settings.
        name: Of a parameter of ours, theirs.
        place: Where in a checkpoint its code looks for the weights.
        folder: Whether it is a folder with a config.json.
    """

    title: str
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    name: Callable[[str], str] = lambda name: name
    place: str = "model"
    folder: bool = False

    def write(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Our names → theirs."""
        return {self.name(name): tensor for name, tensor in tensors.items()}


class _HuggingFace(Project):
    def write(self, tensors: Mapping[str, Tensor]) -> Tensors:
        return to_huggingface(tensors)


def _is_swin(settings: Mapping[str, Any]) -> bool:
    return str(settings["name"]).startswith("swin")


def _is_plain_vit(settings: Mapping[str, Any]) -> bool:
    return settings["name"] == "vit" and bool(settings["key_bias"])


def _is_beit(settings: Mapping[str, Any]) -> bool:
    return settings["name"] == "vit" and not settings["key_bias"]


PROJECTS: dict[str, Project] = {
    "fastmim": Project("encoder.safetensors, as a run leaves it"),
    "timm": Project("timm; a folder with config.json", folder=True),
    "huggingface": _HuggingFace("transformers: SwinModel, Swinv2Model, ViTModel, BeitModel", folder=True),
    "simmim": Project("microsoft/SimMIM", lambda s: not _is_plain_vit(s),
                      lambda name: shift_downsample(f"encoder.{name}", -1)),
    "swin": Project("microsoft/Swin-Transformer", _is_swin, lambda name: shift_downsample(name, -1)),
    "mae": Project("facebookresearch/mae", _is_plain_vit, lambda name: mae.official_name(f"encoder.{name}")),
    "ibot": Project("bytedance/ibot", lambda s: _is_plain_vit(s) or s["name"] == "swin",
                    lambda name: self_distilled.official_name(f"encoder.{name}"), "teacher"),
    "dino": Project("facebookresearch/dino", _is_plain_vit,
                    lambda name: self_distilled.official_name(f"encoder.{name}"), "teacher"),
    "moco": Project("facebookresearch/moco-v3", _is_plain_vit,
                    lambda name: f"module.{moco.official_name(f'encoder.{name}')}", "state_dict"),
    "beit": Project("microsoft/unilm, BEiT", _is_beit, lambda name: beit.official_name(f"encoder.{name}")),
}  # fmt: skip
"""By the words of ``fastmim convert --from`` and ``--to``."""


def told_by(names: Collection[str], beside: Collection[str], prefix: str) -> str:
    """The project that the names of a file without a header of ours are of.

    Args:
        names: Of the tensors, wrappers taken off.
        beside: What else the file holds, and where in it the tensors were.
        prefix: What stands before the names of the encoder.
    """
    if any(name.endswith(PATCHES) for name in names):
        return "huggingface"
    if "base_encoder." in prefix:
        return "moco"
    distilled = "backbone." in prefix or {"teacher", "student"} & set(beside)
    if "ibot_loss" in beside or any(name.endswith("masked_embed") for name in names):
        return "ibot"
    if distilled:  # DINO's code has no Swin
        return "ibot" if f"{prefix}layers.0.blocks.0.norm1.weight" in names else "dino"
    if any(name.startswith(DECODER) for name in names):
        return "mae"
    if "encoder." in prefix or "decoder.0.weight" in names:
        return "simmim"
    if any(name.startswith("lm_head.") for name in names):
        return "beit"
    return "swin" if f"{prefix}layers.0.downsample.reduction.weight" in names else "timm"
