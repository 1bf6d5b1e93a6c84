"""Turn what went wrong with a config into one line: the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from fastmim.wording import as_yaml

Sections = Mapping[str, type[BaseModel]]
"""The class of every section by its name, that of the objective chosen by the config included."""

_EXPECTED = {
    "int_type": "expected an integer",
    "int_parsing": "expected an integer",
    "int_parsing_size": "expected an integer of ordinary size",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text (put quotes around it if it looks like a number)",
    "tuple_type": "expected a list",
    "model_type": "expected a section of keys and values",
    "model_attributes_type": "expected a section of keys and values",
    "too_short": "must not be empty",
    "missing": "required, but not given",
}
_COMPARISONS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


def problem(text: str) -> PydanticCustomError:
    """An error for a validator to raise; its `text` names the field already and is shown as it is."""
    return PydanticCustomError("fastmim", "{text}", {"text": text})


def said_by(section: str, given: Mapping[str, Any], error: ValueError) -> PydanticCustomError:
    """What a component says of its ``argument=value: what; fix``, with its section and the value as it was written."""
    text = str(error)
    argument, _, rest = text.partition("=")
    if argument not in given:
        return problem(text)
    return problem(f"{section}.{argument}={show(given[argument])}: {rest.partition(': ')[2]}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the choice nearest to `name`, or an empty string."""
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def show(value: Any) -> str:
    """`value` as a person would write it in YAML, on one line and not longer than 80 characters."""
    text = as_yaml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(location: Iterable[str | int]) -> str:
    """``("model", "depths", 1)`` as ``model.depths[1]``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def fields_at(sections: Sections, location: Iterable[str | int]) -> Mapping[str, FieldInfo]:
    """The keys of the section in which the key at `location` stands; none of the top, which holds the sections."""
    path = list(location)
    return sections[str(path[0])].model_fields if len(path) > 1 and path[0] in sections else {}


def names_at(sections: Sections, location: tuple[str | int, ...]) -> list[str]:
    """The names that the key at `location` could have."""
    return list(sections if len(location) == 1 else fields_at(sections, location))


def unknown_key(sections: Sections, location: tuple[str | int, ...]) -> str:
    """The line for a key that does not exist: the nearest name, and every name there is."""
    key = str(location[-1])
    names = names_at(sections, location)
    where = dotted(location[:-1])
    hint = nearest(key, names)
    if not hint:
        homes = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
        hint = f"; did you mean '{homes[0]}'?" if homes else ""
    kind = f"keys of {where}" if where else "sections"
    return f"{dotted(location)}: unknown key{hint} ({kind}: {', '.join(names)})"


def one_line(error: ValidationError, sections: Sections) -> str:
    """The first problem in `error` as one line, with a count of the others."""
    errors = error.errors(include_url=False)
    # An unknown key first: what else is wrong may follow from it.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _line(first, sections) + more


def _line(error: ErrorDetails, sections: Sections) -> str:
    kind, location = error["type"], error["loc"]
    context: Mapping[str, Any] = error.get("ctx", {})
    if kind == "fastmim":
        return str(context["text"])
    if kind == "extra_forbidden":
        return unknown_key(sections, location)
    path = dotted(location)
    if kind == "missing":
        return f"{path}: {_EXPECTED[kind]}"
    if kind in _COMPARISONS:
        name, sign = _COMPARISONS[kind]
        text = f"must be {sign} {context[name]:g}"
    elif kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        text = f"expected one of {choices}{nearest(str(error['input']), choices.split(', '))}"
    elif kind == "value_error":
        text = str(context["error"])
    else:
        text = _EXPECTED.get(kind, error["msg"])
    return f"{path}={show(error['input'])}: {text}"
