"""What a weight file says of the encoder and of the images that it was trained with, against what they go into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmim._version import __version__

from ..models import encoder_settings
from ..models.rules import policy_matters, window_sizes

# Weights fit into a model that differs in these, and mean the same there.
_FREE = {
    "img_size", "drop_path_rate", "residual_dtype", "init_values", "window_size", "pretrained_window_size",
    "extra_norm_scope", "policy", "shared_rel_pos_bias", "rel_pos_bias", "init",
}  # fmt: skip
_TABLE = "relative_coords_table"
Span = tuple[int, int]


def header(encoder: Mapping[str, Any], statistics: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What the header of a file of ours says, for :func:`read_facts`.

    Args:
        encoder: Keyword arguments; those that a size or a default gives are added.
        statistics: Of the images: ``mean``, ``std``, ``interpolation``, and of float ones how they were read; None: not
            known.
    """
    full = encoder_settings(encoder) if encoder else {}
    said = {"format": "pt", "source": "fastmim", "version": __version__,
            "encoder": json.dumps({key: value for key, value in full.items() if key != "residual_dtype"})}  # fmt: skip
    return said | ({"statistics": json.dumps(statistics)} if statistics else {})


def read_facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """``encoder`` (keyword arguments), ``statistics`` and ``version`` from the header of one of our files.

    What is not there, or no JSON, is left out.
    """
    facts: dict[str, Any] = {}
    for key in ("encoder", "statistics"):
        try:
            value = json.loads((metadata or {}).get(key, ""))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            facts[key] = value
    if "version" in (metadata or {}):
        facts["version"] = str((metadata or {})["version"])[:40]
    return facts


def check_facts(objective: nn.Module, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Refuse weights that would fit by shape and compute something else; say what else differs.

    Args:
        objective: What the weights go into.
        facts: Of :func:`read_facts`.
        tensors: The file's, for the coordinates that Microsoft's files hold.

    Returns:
        A sentence for each difference that can be wanted.

    Raises:
        ValueError: Another architecture, or another window for SwinV2's position bias where the config does not say
            which one it was trained with.
    """
    own = getattr(objective.encoder, "settings", None)
    if own is None:
        return []
    stored = stored_settings(facts)
    if stored:
        _same_architecture(stored, own)
    notes = check_windows(own, spans_of_tensors(tensors) or _stored_spans(stored))
    return [*notes, *_policy(own, stored), *_statistics(objective, facts.get("statistics", {}))]


def stored_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What built the encoder, of :func:`fastmim.models.encoder_settings`; {} where the file does not say."""
    try:
        settings = encoder_settings(facts["encoder"])
        if "policy" in settings:  # a file that does not say it is of a version that knew timm's way alone
            settings["policy"] = facts["encoder"].get("policy", "parity")
        return {key: _plain(value) for key, value in settings.items()}
    except (KeyError, TypeError, ValueError):
        return {}  # of a version with other encoders; the names of its tensors decide


def _stored_spans(stored: Mapping[str, Any]) -> list[Span]:
    try:
        return _spans(stored)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return []  # a header that nobody has checked


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _same_architecture(stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if stored["name"] != own["name"]:
        raise ValueError(f"holds the weights of a {stored['name']}; set model.name to one, not {own['name']}")
    other = [k for k in own if k in stored and k not in _FREE and not _fits(k, stored[k], _plain(own[k]))]
    if other:
        told = "; ".join(f"model.{key}={_show(own[key])}, the file's is {_show(stored[key])}" for key in other)
        raise ValueError(f"holds the weights of another encoder: {told}")


def _fits(key: str, stored: Any, own: Any) -> bool:
    """The same; learned positions may begin as fixed ones."""
    return stored == own or (key == "abs_pos_embed" and bool(stored) and own is True)


def check_windows(own: Mapping[str, Any], stored: list[Span]) -> list[str]:
    """Refuse position biases of another window than an encoder of settings ``own`` has; say where it stretches them.

    Raises:
        ValueError: The encoder does not say which window they were trained with.
    """
    mine = _spans(own)
    if not mine or len(stored) != len(mine) or stored == mine:
        return []
    theirs, ours = _one_for_all(stored), _one_for_all(mine)
    if own["pretrained_window_size"]:
        said = _show(own["pretrained_window_size"])
        return [f"its position biases were trained with windows of {theirs} tokens, not of {said}"]
    raise ValueError(
        f"its position biases were trained with windows of {theirs} tokens, and model.window_size gives {ours}: the "
        f"same offset would get another bias; set model.pretrained_window_size={theirs} to keep them, or {ours} to "
        "stretch them over the new windows"
    )


def _policy(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    theirs = stored.get("policy")
    if theirs not in ("default", "parity") or theirs == own["policy"]:
        return []
    if not policy_matters(own) or not _policy_mattered(stored):
        return []
    order = {"default": "padded before they were shifted", "parity": "shifted before they were padded"}[theirs]
    return [f"its maps were {order}, unlike those of model.policy={own['policy']}; model.policy={theirs} keeps that"]


def _policy_mattered(stored: Mapping[str, Any]) -> bool:
    try:
        return policy_matters(stored)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False  # a header that nobody has checked


def _spans(settings: Mapping[str, Any]) -> list[Span]:
    """Of each stage of a SwinV2, the window (rows, columns) over whose offsets the coordinates reach 1."""
    if settings["name"] != "swinv2":
        return []
    windows = window_sizes(settings)
    given = settings["pretrained_window_size"]
    pretrained = [given] * len(windows) if isinstance(given, int) else given
    return [(p, p) if p else window for p, window in zip(pretrained, windows, strict=True)]


def spans_of_tensors(tensors: Mapping[str, Tensor]) -> list[Span]:
    """The same from the tables that Microsoft's files hold, of which the largest coordinate of an axis is
    log2(1 + 8 (w - 1) / (p - 1)) / 3 for a window of w trained with p."""
    found: dict[str, Span] = {}
    for name, table in tensors.items():
        if name.endswith(f".{_TABLE}") and table.ndim == 4 and table.shape[-1] == 2 and table.numel():
            axes = [_span(table.shape[1 + axis], float(table[..., axis].float().max())) for axis in (0, 1)]
            found.setdefault(name.partition(".blocks.")[0], (axes[0], axes[1]))
    return list(found.values())


def _span(offsets: int, largest: float) -> int:
    """p from the 2 w - 1 offsets of an axis and its largest coordinate."""
    if not 0 < largest < 10:
        return 1
    return round((offsets - 1) / 2 * 8 / (2 ** (3 * largest) - 1) + 1)


def _one_for_all(spans: list[Span]) -> str:
    edges = [rows if rows == columns else (rows, columns) for rows, columns in spans]
    return _show(edges[0] if len(set(edges)) == 1 else edges)


def _statistics(objective: nn.Module, stored: Mapping[str, Any]) -> list[str]:
    notes = []
    pixels, theirs_pixels = getattr(objective, "pixels", "uint8"), stored.get("pixels", "uint8")
    if theirs_pixels != pixels:
        notes.append(f"its images were of data.pixels={theirs_pixels}, and these are of {pixels}")
    for key in ("mean", "std"):
        own, values = getattr(objective, key, None), stored.get(key)
        if not isinstance(own, Tensor) or own.is_meta or not isinstance(values, list):
            continue
        ordinary = all(isinstance(v, (int, float)) and -1e6 < v < 1e6 for v in values)
        if not ordinary or len(values) not in (1, own.numel()):
            continue
        theirs, mine = torch.tensor(values, dtype=own.dtype).expand(own.numel()), own.flatten().cpu()
        if not torch.allclose(mine, theirs, atol=1e-4):
            used = _show([round(float(v), 4) for v in mine])
            notes.append(f"its images were normalised by {key} {_show(values)}, and these are by data.{key}={used}")
    return notes


def _show(value: Any) -> str:
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, (list, tuple)) else str(value)
