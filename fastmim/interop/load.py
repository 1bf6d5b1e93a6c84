"""Strict loading of foreign weights: every tensor is used, or the error names it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmim._version import __version__
from fastmim.objectives import Objective
from fastmim.objectives.mae import MAE

from .encoder_names import BUFFERS, DECODER, encoder_names, shift_downsample
from .facts import check_facts, read_facts, stored_settings
from .inert import read_torch_file
from .mae import load_mae
from .names import find_state_dict, split_prefix
from .resize import fit_sizes
from .strict import LoadReport, copy_strictly, some_of

log = logging.getLogger("fastmim")

HEADER = "fastmim"
"""Under which a PyTorch file of ours says what the header of a .safetensors file says."""


def load_simmim(objective: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load a SimMIM checkpoint of microsoft/SimMIM or microsoft/Swin-Transformer.

    Args:
        objective: A SimMIM objective built with the checkpoint's sizes.
        state_dict: Official names (``encoder.…``, ``decoder.0.…``), also wrapped as ``{"model": …}``.

    Returns:
        The report; ``names`` covers every parameter of ``objective``.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named.
    """
    tensors = find_state_dict(state_dict).tensors
    report = LoadReport(skipped=[k for k in tensors if k.rsplit(".", 1)[-1] in BUFFERS])
    report.names = {k: _own_name(k) for k in tensors if k not in set(report.skipped)}
    copy_strictly(objective, tensors, report, optional=())
    return report


def load_timm(objective: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load an encoder saved by timm (or a run's ``encoder.safetensors``) into ``objective.encoder``.

    The mask token and the head keep their initial values, a classifier and MAE's decoder are left out; all is reported.

    Raises:
        ValueError: A tensor of the encoder is unknown, missing or of another shape; all are named.
    """
    tensors = find_state_dict(state_dict).tensors
    own = {name for name, _ in objective.named_parameters()}
    named = encoder_names(tensors, mask_token="encoder.mask_token" in own)  # a fine-tuning has none
    report = LoadReport(skipped=sorted(named.left_out))
    report.names = {key: f"encoder.{name}" for key, name in named.own.items()}
    optional = [n for n in own if n == "encoder.mask_token" or not n.startswith("encoder.")]
    copy_strictly(objective, tensors, report, optional)
    return report


def load_weights(objective: nn.Module, path: str | Path, *, called: str | Path | None = None) -> LoadReport:
    """Load a ``.safetensors`` or PyTorch file of any known kind: ours, Microsoft's, timm's, or one that wraps those.

    No code in a file is run. What was loaded, what is new and what was skipped is logged, under the path or as it is
    `called`: a user knows nothing of a file that was made of a run for a moment.

    Raises:
        ValueError: The file is missing, unreadable, of an unknown kind, holds a number that is not finite, does not
            fit the model, or was trained with another window than the model's position biases have.
    """
    content, replaced, facts = read_weights(path)
    called = path if called is None else called
    try:
        found = find_state_dict(content)
        tensors, prefix = _under_prefix(objective, found.tensors)
        notes = check_facts(objective, facts, tensors)
        fitted, resized = _fitted(objective, tensors, facts)
        report = _load_kind(objective, fitted)
        if isinstance(objective, Objective) and not _averages(objective).intersection(report.names.values()):
            objective.after_loading()
    except ValueError as error:
        beside = f" (the file also holds {some_of(replaced)}, which is not run)" if replaced else ""
        raise ValueError(f"{called}: {error}{beside}") from None
    report.place, report.prefix, report.notes = found.place, prefix, notes + resized
    report.not_read = found.passed_over + replaced
    report.skipped += [name for name in found.tensors if name.removeprefix(prefix) not in tensors]
    written = f"; written by fastmim {facts['version']}" if facts.get("version", __version__) != __version__ else ""
    log.info("%s: %s%s", called, report, written)
    for note in report.notes:
        log.warning("%s: %s", called, note)
    return report


def _fitted(
    objective: nn.Module, tensors: dict[str, Tensor], facts: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """What depends on image or window size, for that of the objective's encoder, whose weights alone these are."""
    encoder: Any = getattr(objective, "encoder", None)
    if not hasattr(encoder, "settings") or "patch_embed.proj.weight" not in tensors:
        return tensors, []
    return fit_sizes(encoder, tensors, stored_settings(facts))


def _averages(objective: Objective) -> set[str]:
    """Names of the parameters that are the moving average of others."""
    averages = {id(param) for teacher, _ in objective.ema() for param in teacher.parameters()}
    return {name for name, param in objective.named_parameters() if id(param) in averages}


def _learnt(objective: nn.Module) -> set[str]:
    """Names of its parameters but for those that follow others: what a file of the whole of it holds at least."""
    names = {name for name, _ in objective.named_parameters()}
    return names - _averages(objective) if isinstance(objective, Objective) else names


def _under_prefix(objective: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of the objective, or else of the encoder alone, without the prefix of their names."""
    own = _learnt(objective)
    if own <= tensors.keys():
        return tensors, ""
    prefix = split_prefix(tensors)
    outer = prefix.removesuffix("encoder.")
    whole = {name.removeprefix(outer): tensor for name, tensor in tensors.items() if name.startswith(outer)}
    if own <= whole.keys() or "decoder.0.weight" in whole:
        return whole, outer
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}, prefix


def _load_kind(objective: nn.Module, tensors: dict[str, Tensor]) -> LoadReport:
    if _learnt(objective) <= tensors.keys():
        report = LoadReport(names={k: k for k in tensors})
        averages = _averages(objective) if isinstance(objective, Objective) else set()
        copy_strictly(objective, tensors, report, optional=sorted(averages))
        return report
    if "decoder.0.weight" in tensors:
        return load_simmim(objective, tensors)
    if isinstance(objective, MAE) and any(name.startswith(DECODER) for name in tensors):
        return load_mae(objective, tensors)
    if "patch_embed.proj.weight" in tensors:
        return load_timm(objective, tensors)
    raise ValueError(
        "neither a SimMIM checkpoint (decoder.0.weight) nor an encoder "
        f"(patch_embed.proj.weight); its first names are {', '.join(list(tensors)[:3])}"
    )


def read_weights(path: str | Path) -> tuple[Any, list[str], dict[str, Any]]:
    """The content of a weight file, the kinds of objects in it that were not read, and its facts.

    Raises:
        ValueError: The file is missing or is not a weight file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file" if not path.exists() else f"{path}: not a regular file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                facts = read_facts(file.metadata())
            return load_file(path), [], facts
        content, replaced = read_torch_file(path)
    except Exception as error:  # torch and safetensors raise half a dozen types for a broken file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a readable weight file ({reason[:200]})") from None
    if isinstance(content, dict) and isinstance(content.get(HEADER), dict):
        return content, replaced, read_facts(content.pop(HEADER))
    return content, replaced, {}


def _own_name(name: str) -> str:
    if name.startswith("decoder.0."):
        return "head." + name.removeprefix("decoder.0.")
    return shift_downsample(name)
