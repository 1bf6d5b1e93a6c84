"""Values put into the text of a config, whose comments and order stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fastmim.config import yaml_text


def with_values(text: str, section: str, values: Mapping[str, Any]) -> str:
    """`text`, a YAML config, in which ``section.key`` is each of `values`.

    A value that is there is replaced where it stands; a new key goes to the top of its section, a new section to the
    end.

    Raises:
        ValueError: not YAML, or written in a way in which that cannot be done, as with anchors.
    """
    tree = yaml_text.parse(text) or {}
    if not isinstance(tree, dict) or not isinstance(tree.get(section) or {}, dict):
        raise ValueError(f"expected sections, and {section} with keys and values")
    wanted = {**tree, section: {**(tree.get(section) or {}), **values}}
    try:
        for key, value in reversed(list(values.items())):  # each goes to the top
            text = _with(text, section, key, yaml_text.dump([value]).strip()[1:-1])
        if yaml_text.parse(text) == wanted:
            return text
    except (ValueError, yaml.YAMLError):
        pass
    lines = ", ".join(f"{key}: {yaml_text.dump([value]).strip()[1:-1]}" for key, value in values.items())
    raise ValueError(f"cannot be changed as {section} is written there; put it in by hand: {lines}")


def _with(text: str, section: str, key: str, shown: str) -> str:
    """With one value, as it is shown."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = _entry(root, section)
    if found is None:
        gap = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{gap}{section}:\n  {key}: {shown}\n"
    name, body = found
    entry = _entry(body, key)
    if entry is not None:
        start, end = (mark.index for mark in (entry[1].start_mark, entry[1].end_mark))
        end = start + len(text[start:end].rstrip())  # a list in lines ends where the next key starts
        return text[:start] + shown + text[end:]
    keys = getattr(body, "value", None)
    if isinstance(body, yaml.MappingNode) and keys:
        mark = keys[0][0].start_mark
        gap = ", " if body.flow_style else f"\n{' ' * mark.column}"
        return f"{text[: mark.index]}{key}: {shown}{gap}{text[mark.index :]}"
    after = text.index(":", name.end_mark.index) + 1  # a section without keys is null
    return f"{text[:after]}\n  {key}: {shown}{text[after:]}"


def _entry(node: Any, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((name, value) for name, value in node.value if name.value == key), None)
