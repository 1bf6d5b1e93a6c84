"""Where in a file the weights lie, and under which prefix: the ways in which training programs wrap a state dict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .inert import StandIn

# Averaged weights come before those that they are an average of, as timm takes them.
_KEYS = (
    "model_ema", "state_dict_ema", "ema", "teacher", "model", "state_dict", "module", "backbone", "encoder", "student",
)  # fmt: skip
_PATCHES = "patch_embed.proj.weight"
_WRAPPERS = ("module.", "_orig_mod.")
_MOST_DEPTH = 5


class Found(NamedTuple):
    """Tensors by name; ``place`` says where they were, ``passed_over`` what else is there."""

    tensors: dict[str, Tensor]
    place: str
    passed_over: list[str]


def find_state_dict(content: Any) -> Found:
    """The tensors of a file, taken out of the dictionaries around them.

    Raises:
        ValueError: There are none, or one of them is another object, which is named.
    """
    path: list[str] = []
    passed_over: list[str] = []
    while len(path) < _MOST_DEPTH:
        if not isinstance(content, Mapping):
            raise ValueError(f"state_dict: expected tensors by name, got {_kind(content)}{_inside(path)}")
        if any(isinstance(value, Tensor) for value in content.values()):
            break
        holders = [key for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
        known = [key for key in _KEYS if key in content and (key in holders or len(holders) == 0)]
        if not known and len(holders) != 1:
            raise ValueError(f"state_dict: expected tensors by name, got {_entries(content)}{_inside(path)}")
        chosen = known[0] if known else holders[0]
        passed_over += [".".join([*path, str(key)]) for key in content if key != chosen]
        path.append(str(chosen))
        content = content[chosen]
    strange = {k: v for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)}
    if strange:
        raise ValueError(f"state_dict: expected tensors by name, got {_entries(strange)}{_inside(path)}")
    return Found(without_wrappers(content), ".".join(path), passed_over)


def split_prefix(names: Collection[str]) -> str:
    """What stands before the names of the encoder, such as ``backbone.``; empty where there is nothing, or no encoder.

    Of MoCo v3 it is the base encoder's, which its authors evaluate, not that of the momentum encoder.

    Raises:
        ValueError: Two encoders, neither of them a teacher or a moving average.
    """
    prefixes = [name.removesuffix(_PATCHES) for name in names if f".{name}".endswith(f".{_PATCHES}")]
    for mark in ("ema", "teacher", "student", ""):
        marked = [prefix for prefix in prefixes if mark in prefix and "momentum_encoder" not in prefix]
        if len(marked) == 1:
            return marked[0]
        if len(marked) > 1:
            listed = ", ".join(map(repr, marked[:4]))
            raise ValueError(f"state_dict: encoders under {listed}; keep one of them in the file")
    return ""


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DistributedDataParallel and torch.compile put before, or between, the parts of a name."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        while wrapper := next((w for w in _WRAPPERS if short.startswith(w)), None):
            short = short.removeprefix(wrapper)
        short = short.replace("._orig_mod.", ".")
        if short in renamed:
            raise ValueError(f"state_dict: {name} is there twice, with and without a prefix")
        renamed[short] = tensor
    return renamed


def _has_tensors(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping):
        return isinstance(value, Tensor)
    # Moments of an optimiser, under a key that is not the weights', lie under numbers.
    inner = [v for k, v in value.items() if isinstance(k, str) and k != "state"]
    return depth < _MOST_DEPTH and any(_has_tensors(v, depth + 1) for v in inner)


def _kind(value: Any) -> str:
    return f"a {value.kind}" if isinstance(value, StandIn) else f"a {type(value).__name__}"


def _entries(content: Mapping[Any, Any]) -> str:
    listed = [f"{str(key)[:60]} ({_kind(value)})" for key, value in list(content.items())[:3]]
    return ", ".join(listed) or "nothing"


def _inside(path: list[str]) -> str:
    return f" inside {'.'.join(path)}" if path else ""
