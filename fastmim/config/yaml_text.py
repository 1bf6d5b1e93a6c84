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


_MOST_DEPTH = 20
_MOST_VALUES = 10_000
_MOST_DIGITS = 400


_PATTERNS = {name: pattern for name, pattern, _ in _SCALARS}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {}, 0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != f"{_TAG}merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """How many values a node stands for, what anchors repeat counted as often as it is repeated.

    Raises:
        yaml.MarkedYAMLError: it holds itself, is deeper or larger than a config is, or has a tag or a value of no use.
    """
    if depth > _MOST_DEPTH:
        raise _refusal(node, "values are nested too deeply, or hold themselves")
    if id(node) not in counts:
        _check_tag(node)
        pairs = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = pairs if isinstance(node, yaml.CollectionNode) else []
        counts[id(node)] = 1 + sum(_count(one, counts, depth + 1) for one in inner)
    if counts[id(node)] > _MOST_VALUES:
        raise _refusal(node, f"more than {_MOST_VALUES} values")
    return counts[id(node)]


def _check_tag(node: yaml.Node) -> None:
    kind = node.tag.removeprefix(_TAG)
    collections = {"seq": yaml.SequenceNode, "map": yaml.MappingNode, "str": yaml.ScalarNode}
    wanted = collections.get(kind, yaml.ScalarNode if kind in _PATTERNS else ())
    if not isinstance(node, wanted):
        raise _refusal(node, f"the tag {_short(node.tag)} has no use here; write the value alone")
    if kind in _PATTERNS and not _PATTERNS[kind].fullmatch(node.value):
        raise _refusal(node, f"{_short(node.value)} is no {kind}, as its tag says; write the value alone")
    if kind in ("int", "float") and len(node.value) > _MOST_DIGITS:
        raise _refusal(node, f"a number of {len(node.value)} digits")
    if isinstance(node, yaml.ScalarNode) and not _is_unicode(node.value):
        raise _refusal(node, "half a character (a lone surrogate)")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _short(text: str) -> str:
    text = text.replace(_TAG, "!!")
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _refusal(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)


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
        ValueError: not YAML, a key given twice, a tag, values that hold themselves or are too many; one line with the
            position.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{' '.join(str(error.problem or error.context).split())}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def dump(value: Any) -> str:
    """`value` (dicts, lists, scalars) as YAML that :func:`parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
