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
        ValueError: not YAML, or written in a way in which that cannot be done, as with ``{braces}`` or anchors.
    """
    tree = yaml_text.parse(text) or {}
    if not isinstance(tree, dict) or not isinstance(tree.get(section) or {}, dict):
        raise ValueError(f"expected sections, and {section} with keys and values")
    wanted = {**tree, section: {**(tree.get(section) or {}), **values}}
    for key, value in values.items():
        text = _with(text, section, key, yaml_text.dump([value]).strip()[1:-1])
    try:
        done = yaml_text.parse(text) == wanted
    except ValueError:
        done = False
    if not done:
        keys = ", ".join(values)
        raise ValueError(f"cannot be changed as it is written; give {section} a line of its own for each key ({keys})")
    return text


def _with(text: str, section: str, key: str, shown: str) -> str:
    """With one value, as it is shown."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = _entry(root, section)
    if found is None:
        end = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{end}{section}:\n  {key}: {shown}\n"
    name, body = found
    entry = _entry(body, key)
    if entry is not None:
        return text[: entry[1].start_mark.index] + shown + text[entry[1].end_mark.index :]
    keys = getattr(body, "value", None)
    if isinstance(body, yaml.MappingNode) and keys:
        start = keys[0][0].start_mark
        return f"{text[: start.index]}{key}: {shown}\n{' ' * start.column}{text[start.index :]}"
    at = text.index(":", name.end_mark.index) + 1  # a section without keys is null
    return f"{text[:at]}\n  {key}: {shown}{text[at:]}"


def _entry(node: Any, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((name, value) for name, value in node.value if name.value == key), None)
