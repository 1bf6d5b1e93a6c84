"""Every key with its type, default and meaning, as YAML with comments; and where two configs differ."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from fastmim.config import yaml_text
from fastmim.config.fields import Section, describe
from fastmim.config.messages import show, unknown_key
from fastmim.config.sections import Config


def explain(cfg: Config, named: Sequence[str] = ()) -> str:
    """`cfg` as YAML that can be loaded again, with a comment above every key.

    Args:
        named: ``section`` or ``section.key``: these alone; all where none is named.

    Raises:
        ValueError: there is no such section or key; names the nearest.
    """
    tree = cfg.model_dump(mode="json")
    for name in named:
        _check(cfg, tuple(name.split(".")))
    chosen = {
        section: {key: value for key, value in values.items() if not named or {section, f"{section}.{key}"} & {*named}}
        for section, values in tree.items()
    }
    return "\n".join(_section(name, getattr(cfg, name), values) for name, values in chosen.items() if values)


def _check(cfg: Config, parts: tuple[str, ...]) -> None:
    if not all(part.strip() for part in parts):
        raise ValueError(f"'{'.'.join(parts)}': expected a section or section.key, for example optim or optim.lr")
    sections = {name: type(getattr(cfg, name)) for name in type(cfg).model_fields}
    for location in (parts[:1], parts[:2]):
        known = sections if len(location) == 1 else sections[location[0]].model_fields
        if location[-1] not in known:
            raise ValueError(unknown_key(sections, location))
    if len(parts) > 2:
        raise ValueError(f"{'.'.join(parts)}: {'.'.join(parts[:2])} is a value, not a section")


def differences(first: Config, second: Config) -> dict[str, tuple[str, str]]:
    """(value in the first, value in the second) as YAML of every key in which they differ, by ``section.key``.

    A key that only one of them has, as those of two objectives, is "(none)" in the other.
    """
    flat = [
        {f"{section}.{key}": _as_yaml(value) for section, values in cfg.model_dump(mode="json").items()
         for key, value in values.items()}
        for cfg in (first, second)
    ]  # fmt: skip
    pairs = {key: (flat[0].get(key, "(none)"), flat[1].get(key, "(none)")) for key in {**flat[0], **flat[1]}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _as_yaml(value: Any) -> str:
    """On one line, in full."""
    return yaml_text.dump([value]).strip()[1:-1]


def _plain(text: str) -> str:
    """Words of a docstring as a terminal shows them: of a role the last name, of a literal what is in it."""
    text = re.sub(r":\w+:`[~.\w]*?(\w+)`", r"\1", text)
    return re.sub(r"``(.+?)``", r"\1", text)


def _section(name: str, section: Section, values: dict[str, object]) -> str:
    lines = [f"# {_plain(section.__doc__ or '')}", f"{name}:"]
    for key, field in type(section).model_fields.items():
        if key not in values:
            continue
        default = "required" if field.is_required() else f"default {show(field.default)}"
        comment = f"{_plain(field.description or '')} ({describe(field.annotation)}; {default})".lstrip()
        lines += textwrap.wrap(comment, 100, initial_indent="  # ", subsequent_indent="  #   ")
        lines.append(textwrap.indent(yaml_text.dump({key: values[key]}).rstrip(), "  "))
    return "\n".join(lines) + "\n"
