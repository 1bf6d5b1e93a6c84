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


_DEEPEST, _MOST = 50, 100_000
"""Levels of a config, and values with those that aliases repeat: far beyond what a person writes."""


class _Loader(yaml.SafeLoader):
    # Only what a config is made of, so that a tag such as !!timestamp or !!set is refused by its name.
    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }
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


def _checked(name: str, pattern: re.Pattern[str]) -> None:
    """A tag that somebody wrote, as in ``!!bool x``, does not make its text one."""
    construct = _Loader.yaml_constructors[_TAG + name]

    def check(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not pattern.match(str(text)):
            raise yaml.constructor.ConstructorError(None, None, f"{str(text)[:80]!r} is not !!{name}", node.start_mark)
        if name == "int":
            digits = str(text).replace("_", "")
            if len(digits) > 40:
                raise yaml.constructor.ConstructorError(None, None, "a number of over 40 digits", node.start_mark)
            return int(digits)
        return construct(loader, node)

    _Loader.add_constructor(_TAG + name, check)


for _name, _pattern, _ in _SCALARS[:4]:
    _checked(_name, _pattern)
_Dumper.add_representer(list, lambda dumper, v: dumper.represent_sequence(f"{_TAG}seq", v, flow_style=True))


def parse(text: str) -> Any:
    """The value that `text` stands for.

    Raises:
        ValueError: not YAML, a key given twice, or a value that contains itself; one line with the position.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        _count(value, {}, ())
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _count(value: Any, known: dict[int, int], within: tuple[int, ...]) -> int:
    """Values in ``value``, those that an alias repeats counted each time.

    Raises:
        ValueError: It contains itself, is nested too deeply, or grows beyond all measure.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) in within:
        raise ValueError("an anchor contains itself")
    if len(within) >= _DEEPEST:
        raise ValueError("nested too deeply")
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known, (*within, id(value))) for part in parts)
    if known[id(value)] > _MOST:
        raise ValueError(f"more than {_MOST} values")
    return known[id(value)]


def dump(value: Any) -> str:
    """`value` (dicts, lists, scalars) as YAML that :func:`parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
