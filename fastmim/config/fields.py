"""The value types of the config: what YAML may hold for a field, and what the refusal of the rest says."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Pair = tuple[float, float]


class Section(BaseModel):
    """Base of every section: no unknown keys, no NaN, no assignment after the checks have run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """A section whose keys are all commented out is null in YAML."""
        return {} if value is None else value


def _not_bool(value: Any) -> Any:
    # pydantic would take `true` for 1.
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _a_list(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError("expected a list in brackets")
    return value


def at_most(limit: float, why: str) -> AfterValidator:
    """Refuses larger numbers, and says why no larger one can be meant."""

    def check(value: Any) -> Any:
        for number in value if isinstance(value, tuple) else [value]:
            if number > limit:
                raise ValueError(f"must be <= {limit:g}: {why}" if limit > 10**15 else f"must be <= {limit}: {why}")
        return value

    return AfterValidator(check)


def _ordered(value: Pair) -> Pair:
    if value[0] > value[1]:
        raise ValueError(f"must be in order; use [{value[1]:g}, {value[0]:g}]")
    return value


def _a_pair(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("expected two numbers [low, high]")
    return value


def _size(value: Any) -> Any:
    """`img_size`: one integer for a square, or [height, width]; a square list becomes the integer."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if len(parts) not in (1, 2) or not all(_whole(p) for p in parts):
        raise ValueError("expected a positive integer or [height, width]")
    height, width = int(parts[0]), int(parts[-1])
    if max(height, width) > EDGE or height * width > PIXELS:
        raise ValueError(f"larger than {EDGE} pixels on an edge, or {PIXELS} in all: no GPU holds the maps of one")
    return height if height == width else (height, width)


def _int_or_ints(value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not parts or not all(_whole(p, least=0) for p in parts):
        raise ValueError("expected an integer or a list of integers")
    if max(parts) > EDGE:
        raise ValueError(f"must be <= {EDGE}: no map has as many tokens on an edge, and no model as many heads")
    return tuple(int(p) for p in parts) if isinstance(value, (list, tuple)) else int(value)


def _whole(value: Any, least: int = 1) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and value == value // 1 and value >= least


def _auto_or_bool(value: Any) -> Any:
    if value is None or value in ("auto", True, False):
        return "auto" if value is None else value
    raise ValueError("expected auto, true or false")


def _fused(value: Any) -> Any:
    if value in ("apex", "cpu_adam"):
        return value
    try:
        return _auto_or_bool(value)
    except ValueError:
        raise ValueError("expected auto, true, false, apex or cpu_adam") from None


def _path(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a path")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("expected a path in UTF-8, which the config of the run can name")
    return os.path.expanduser(value)


EDGE, PIXELS = 65_535, 2**28

_COUNT = at_most(2**31 - 1, "no run counts further")
Int = Annotated[int, BeforeValidator(_not_bool), at_most(2**63 - 1, "integers have 64 bits")]
Count = Annotated[Int, Field(ge=0), _COUNT]
Positive = Annotated[Int, Field(gt=0), _COUNT]
Seed = Annotated[Int, Field(ge=0)]
Edge = Annotated[Positive, at_most(EDGE, "the longest edge that a JPEG can have, in pixels")]
Width = Annotated[Positive, at_most(2**16, "no known model is as wide")]
Layers = Annotated[Positive, at_most(1000, "no known model is as deep")]
Batch = Annotated[Positive, at_most(2**20, "no device holds or counts as many images")]
Cores = Annotated[Positive, at_most(1024, "more than a machine has cores")]
Processes = Annotated[Count, at_most(1024, "more than a machine has cores")]
Pictures = Annotated[Count, at_most(1024, "one picture shows them all")]
Number = Annotated[float, BeforeValidator(_not_bool), at_most(3.4e38, "single precision holds no larger number")]
Rate = Annotated[Number, Field(ge=0)]
AboveZero = Annotated[Number, Field(gt=0)]
Epochs = Annotated[Rate, at_most(1e6, "no run is as long")]
Period = Annotated[AboveZero, at_most(1e6, "no run is as long")]
Widening = Annotated[AboveZero, at_most(256, "the MLP would be larger than all the rest")]
Probability = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Stages = Annotated[tuple[Layers, ...], BeforeValidator(_a_list), Field(min_length=1, max_length=16)]
Counts = Annotated[
    tuple[Count, ...], BeforeValidator(lambda v: () if v is None else _a_list(v)), Field(max_length=1000)
]
Channels = Annotated[tuple[Number, ...], BeforeValidator(_a_list), Field(min_length=1)]
Spreads = Annotated[tuple[AboveZero, ...], BeforeValidator(_a_list), Field(min_length=1)]
Betas = Annotated[tuple[BelowOne, BelowOne], BeforeValidator(_a_pair)]
# The fields inside are checked one by one, so that a bad entry is named as scale[1].
Range = Annotated[tuple[AboveZero, AboveZero], BeforeValidator(_a_pair), AfterValidator(_ordered)]
UnitRange = Annotated[
    tuple[Annotated[AboveZero, Field(le=1)], Annotated[AboveZero, Field(le=1)]],
    BeforeValidator(_a_pair),
    AfterValidator(_ordered),
]
Path = Annotated[str, AfterValidator(_path)]
# The validator runs before the union, which would report one error per member.
Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
IntOrInts = Annotated[int | tuple[int, ...], BeforeValidator(_int_or_ints)]
Tree = Annotated[dict[str, Any], BeforeValidator(lambda v: {} if v is None else v)]
AutoOrBool = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]

Fused = Annotated[Literal["auto", "apex", "cpu_adam"] | bool, BeforeValidator(_fused)]


def describe(annotation: Any) -> str:
    """The type of a field in words, for ``fastmim config keys``."""
    words = {Size: "integer or [height, width]", IntOrInts: "integer or list"}
    if annotation in words:
        return words[annotation]
    arguments = getattr(annotation, "__args__", ())
    if getattr(annotation, "__metadata__", None):
        return describe(annotation.__origin__)
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(map(str, arguments))
    if getattr(annotation, "__origin__", None) is tuple:
        return "list"
    if getattr(annotation, "__origin__", None) is dict:
        return "section"
    if arguments:
        return " or ".join(describe(a) for a in arguments)
    plain = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return plain.get(annotation, "value")
