"""A tree of keys as YAML with a comment beside each, at the width of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from fastmim.config import yaml_text

_WIDTH, _COLUMN = 80, 30
_ORDER = ("model", "objective", "data", "optim", "train", "efficiency", "output")


def as_yaml(tree: Mapping[str, Any], reasons: Mapping[str, str], heading: str) -> str:
    """``tree`` as YAML.

    Args:
        tree: sections of keys and values.
        reasons: by ``section.key``; a key without one was given.
        heading: comment above.
    """
    lines = textwrap.wrap(heading, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    for section in [name for name in _ORDER if tree.get(name)]:
        lines.append(f"{section}:")
        for key, value in tree[section].items():
            lines += _with_comment(key, value, reasons.get(f"{section}.{key}", "as given"))
    return "\n".join(lines) + "\n"


def _with_comment(key: str, value: Any, reason: str) -> list[str]:
    code = [f"  {line}" for line in yaml_text.dump({key: value}).rstrip().splitlines()]
    words = textwrap.wrap(reason, _WIDTH - _COLUMN - 2)
    # A long value has its comment above it.
    if len(code) > 1 or len(code[0]) >= _COLUMN:
        return [*(f"  # {line}" for line in textwrap.wrap(reason, _WIDTH - 4)), *code]
    first, *more = words
    return [f"{code[0]:{_COLUMN}}# {first}", *(f"{'':{_COLUMN}}# {line}" for line in more)]
