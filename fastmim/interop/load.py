"""Strict loading of foreign weights: every tensor is used, or the error names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Recomputed at construction; never loaded."""


@dataclass
class LoadReport:
    """What a load did.

    Attributes:
        names: Foreign name → own parameter name, of every tensor loaded.
        skipped: Foreign names that hold no weights of this model (buffers, classifier heads).
        initialised: Own parameters that the source does not have and that keep their initial values.
    """

    names: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)


def load_reference(objective: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load a SimMIM checkpoint of microsoft/SimMIM or microsoft/Swin-Transformer.

    Args:
        objective: A SimMIM objective built with the checkpoint's sizes.
        state_dict: Official names (``encoder.…``, ``decoder.0.…``), also wrapped as ``{"model": …}``.

    Returns:
        The report; ``names`` covers every parameter of ``objective``.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named.
    """
    tensors = _unwrap(state_dict)
    report = LoadReport(skipped=[k for k in tensors if k.rsplit(".", 1)[-1] in BUFFERS])
    report.names = {k: _own_name(k) for k in tensors if k not in set(report.skipped)}
    _copy(objective, tensors, report, optional=())
    return report


def load_timm(objective: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load an encoder saved by timm (or a run's ``encoder.safetensors``) into ``objective.encoder``.

    The mask token and the head keep their initial values, a classifier is left out; both are reported.

    Raises:
        ValueError: A tensor of the encoder is unknown, missing or of another shape; all are named.
    """
    tensors = _unwrap(state_dict)
    skip = {k for k in tensors if k.rsplit(".", 1)[-1] in BUFFERS or k.startswith("head.")}
    report = LoadReport(skipped=sorted(skip))
    old = "layers.0.downsample.reduction.weight" in tensors
    for key in tensors:
        if key not in skip:
            report.names[key] = "encoder." + (_shift_downsample(key) if old else key)
    own = [name for name, _ in objective.named_parameters()]
    optional = [n for n in own if n == "encoder.mask_token" or not n.startswith("encoder.")]
    _copy(objective, tensors, report, optional)
    return report


def load_weights(objective: nn.Module, path: str | Path) -> LoadReport:
    """Load a ``.safetensors`` or PyTorch file of any known kind: ours, Microsoft's or timm's.

    PyTorch files are read with ``weights_only``: no code in them is run.

    Raises:
        ValueError: The file is missing, unreadable, of an unknown kind, or does not fit the model.
    """
    tensors = _unwrap(read_tensors(path))
    own = {name for name, _ in objective.named_parameters()}
    if own <= set(tensors):
        report = LoadReport(names={k: k for k in tensors})
        _copy(objective, tensors, report, optional=())
        return report
    if "decoder.0.weight" in tensors:
        return load_reference(objective, tensors)
    if "patch_embed.proj.weight" in tensors:
        return load_timm(objective, tensors)
    raise ValueError(
        f"{path}: neither a SimMIM checkpoint (decoder.0.weight) nor an encoder "
        f"(patch_embed.proj.weight); its first names are {', '.join(list(tensors)[:3])}"
    )


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a weight file without running anything in it.

    Raises:
        ValueError: The file is missing or is not a weight file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen types for a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable weight file ({reason})") from None


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("model", "state_dict", "module"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    tensors = {k.removeprefix("module."): v for k, v in state_dict.items()}
    strange = [k for k, v in tensors.items() if not isinstance(v, Tensor)]
    if strange or not tensors:
        raise ValueError(f"state_dict: expected tensors by name, got {strange[:3] or 'nothing'}")
    return tensors


def _own_name(name: str) -> str:
    if name.startswith("decoder.0."):
        return "head." + name.removeprefix("decoder.0.")
    return _shift_downsample(name)


def _shift_downsample(name: str) -> str:
    # Microsoft merges patches at the end of a stage, timm at the start of the next.
    return re.sub(r"\blayers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)


def _copy(objective: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport, optional: list[str] | tuple) -> None:
    own = dict(objective.named_parameters())
    unknown = [k for k, v in report.names.items() if v not in own]
    missing = [k for k in own if k not in set(report.names.values()) and k not in optional]
    shapes = [
        f"{k} {tuple(tensors[k].shape)} against {tuple(own[v].shape)}"
        for k, v in report.names.items()
        if v in own and not _same_shape(tensors[k], own[v])
    ]
    problems = [("unknown", unknown), ("missing", missing), ("of another shape", shapes)]
    if any(names for _, names in problems):
        raise ValueError(
            "weights do not fit the model: "
            + "; ".join(f"{len(names)} {what} ({', '.join(names)})" for what, names in problems if names)
        )
    report.initialised = [k for k in own if k in optional]
    with torch.no_grad():
        for key, name in report.names.items():
            own[name].copy_(tensors[key].reshape(own[name].shape))


def _same_shape(source: Tensor, target: Tensor) -> bool:
    # The head is a 1×1 convolution there and a matrix here.
    return tuple(s for s in source.shape if s != 1) == tuple(s for s in target.shape if s != 1)
