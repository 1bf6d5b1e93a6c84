"""The section ``objective``: its keys are the arguments of the objective that its ``name`` says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model

from fastmim.config.fields import Section
from fastmim.config.messages import problem, said_by, show
from fastmim.config.signature import arguments

DEFAULT = "simmim"
# What every objective takes from other sections.
_GIVEN = ("encoder", "impl", "mean", "std", "pixels", "has_gaps", "bands")


class ObjectiveSection(Section):
    """The pretraining task; every objective has keys of its own beside ``name``."""

    name: str = Field(DEFAULT, description="pretraining objective")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that ``create_objective`` takes beside name and encoder."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}

    def __reduce__(self) -> Any:
        # pickle looks a class up by its name, which one that is made from a signature does not have.
        return _restored, (self.model_dump(),)


def _restored(values: dict[str, Any]) -> ObjectiveSection:
    return objective_section(values["name"]).model_validate(values)


def objective_section(name: Any) -> type[ObjectiveSection]:
    """The section of an objective: types and defaults from its constructor, words from its docstring.

    Args:
        name: A key of :data:`fastmim.objectives.OBJECTIVES` or ``package.module:Class``.

    Raises:
        PydanticCustomError: There is no such objective.
    """
    if not isinstance(name, str):
        raise problem(f"objective.name={show(name)}: expected text, for example {DEFAULT}")
    try:
        return _section(name)
    except ValueError as error:
        raise said_by("objective", {"name": name}, error) from None


@functools.cache
def _section(name: str) -> type[ObjectiveSection]:
    # Imported here: torch is loaded only when a config is.
    from fastmim.objectives import OBJECTIVES, find_objective

    objective = find_objective(name)
    known = f"pretraining objective: {', '.join(OBJECTIVES)}, or package.module:Class of your own"
    fields: dict[str, Any] = {"name": (str, Field(name, description=f"{known}; each has keys of its own"))}
    for key, argument in arguments(objective).items():
        if key not in _GIVEN:
            default = ... if argument.default is inspect.Parameter.empty else argument.default
            fields[key] = (argument.annotation, Field(default, description=argument.description))
    summary = inspect.cleandoc(objective.__doc__ or "").partition("\n")[0]
    return create_model(f"{objective.__name__}Section", __base__=ObjectiveSection, __doc__=summary, **fields)


def _of_its_objective(value: Any) -> Any:
    if value is None or isinstance(value, Mapping):
        value = dict(value or {})
        return objective_section(value.get("name", DEFAULT)).model_validate(value)
    return value


AnyObjective = Annotated[SerializeAsAny[ObjectiveSection], BeforeValidator(_of_its_objective)]
"""A section of keys and values, checked and kept as the section of its own objective."""
