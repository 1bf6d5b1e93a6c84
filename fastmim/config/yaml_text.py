"""YAML as this project reads and writes it: safe, no duplicate keys, and only numbers are numbers.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``no`` is false, ``1:30`` is ninety and ``010`` is eight.
Here the scalars follow the core schema of YAML 1.2 (section 10.3): decimal integers, floats with or without a
point, ``true``/``false``, ``null``; everything else is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# Tried in this order; the second entry lists the first characters that a match can have.
_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    (
        "float",
        re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.nan$"),
        list("-+.0123456789"),
    ),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != f"{_TAG}merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    # A copy: what PyYAML or this loader would not read back as text is quoted.
    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value.replace("_", "")))
_Dumper.add_representer(list, lambda dumper, v: dumper.represent_sequence(f"{_TAG}seq", v, flow_style=True))


def parse(text: str) -> Any:
    """The value that `text` stands for.

    Raises:
        ValueError: not YAML, or a key given twice; one line with the position.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def dump(value: Any) -> str:
    """`value` (dicts, lists, scalars) as YAML that :func:`parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
