"""A component's settings, read off its constructor: the signature gives types and defaults, the docstring the rest."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from fastmim.config.fields import Int, Number

_CHECKED = {int: Int, float: Number}
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


class Argument(NamedTuple):
    """A keyword argument; ``default`` is ``inspect.Parameter.empty`` where one must be given."""

    annotation: Any
    default: Any
    description: str


def arguments(component: type) -> dict[str, Argument]:
    """The keyword arguments of a class, in order, and those of its base where it passes ``**`` on to it."""
    constructor: Any = component.__init__  # type: ignore[misc]
    hints, told = get_type_hints(constructor, include_extras=True), _descriptions(component)
    found: dict[str, Argument] = {}
    for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            parent = next(base for base in component.__mro__[1:] if "__init__" in vars(base))
            found = {**arguments(parent), **found} if parent is not object else found
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            found[name] = Argument(_strict(hints.get(name, Any)), parameter.default, told.get(name, ""))
    return found


def _strict(annotation: Any) -> Any:
    """The same type, whose numbers are no booleans."""
    inner, origin = tuple(map(_strict, get_args(annotation))), get_origin(annotation)
    if origin is tuple:
        return tuple[inner]  # type: ignore[valid-type]
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007 - made from values
    return _CHECKED.get(annotation, annotation)


def _descriptions(component: type) -> dict[str, str]:
    """What stands under ``Args:`` in the docstring of a class, by argument."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in _block(inspect.cleandoc(component.__doc__ or ""), "Args:"):
        entry = _ENTRY.fullmatch(line)
        names = entry[1].split(", ") if entry else names
        for name in names:
            found[name] = entry[2] if entry else f"{found[name]} {line.strip()}"
    return found


def _block(text: str, heading: str) -> Iterator[str]:
    """The indented lines under a heading, without their common indent of four."""
    inside = False
    for line in text.splitlines():
        if inside and line and not line.startswith("    "):
            return
        if inside and line:
            yield line[4:]
        inside = inside or line == heading
