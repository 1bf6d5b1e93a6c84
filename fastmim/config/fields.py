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


def _once(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"each at most once; use [{', '.join(dict.fromkeys(value))}]")
    return value


def _ordered(value: Pair) -> Pair:
    if value[0] > value[1]:
        raise ValueError(f"must be in order; use [{value[1]:g}, {value[0]:g}]")
    return value


def _rising(value: Pair) -> Pair:
    if value[0] >= value[1]:
        raise ValueError("must be [low, high] with low < high, for example [0, 4095]")
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
    return height if height == width else (height, width)


def _int_or_ints(value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not parts or not all(_whole(p, least=0) for p in parts):
        raise ValueError("expected an integer or a list of integers")
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


def _positions(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value in ("sincos", "sincos_moco"):
        return value
    raise ValueError("expected true, false, sincos or sincos_moco")


def _no_data(value: Any) -> Any:
    """A finite number; NaN becomes the text ``nan``, which JSON has."""
    if isinstance(value, str) and value.lower() == "nan":
        return "nan"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) == float("inf"):
        raise ValueError("expected a number, nan or null")
    return float(value) if value == value else "nan"


def _path(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a path")
    return os.path.expanduser(value)


def _path_or_paths(value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected a path or a list of paths")
    paths = tuple(_path(part) for part in parts)
    return paths if len(paths) > 1 else paths[0]


Int = Annotated[int, BeforeValidator(_not_bool)]
# Counters and kernels have 32 bits; a seed has those of torch's generators.
Count = Annotated[Int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[Int, Field(gt=0, le=2**31 - 1)]
Seed = Annotated[Int, Field(ge=0, le=2**63 - 1)]
Number = Annotated[float, BeforeValidator(_not_bool)]
Rate = Annotated[Number, Field(ge=0)]
AboveZero = Annotated[Number, Field(gt=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Fraction = Annotated[Number, Field(gt=0, lt=1)]
Positives = Annotated[tuple[Positive, ...], BeforeValidator(_a_list), Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(lambda v: () if v is None else _a_list(v))]
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
PathOrPaths = Annotated[str | tuple[str, ...], BeforeValidator(_path_or_paths)]
Weights = Annotated[tuple[AboveZero, ...], BeforeValidator(_a_list), Field(min_length=1)]
Interval = Annotated[tuple[Number, Number], BeforeValidator(_a_pair), AfterValidator(_rising)]
Loggers = Annotated[
    tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...],
    BeforeValidator(lambda v: () if v is None else _a_list(v)),
    AfterValidator(_once),
]
NoData = Annotated[float | Literal["nan"], BeforeValidator(_no_data)]
Tree = Annotated[dict[str, Any], BeforeValidator(lambda v: {} if v is None else v)]
AutoOrBool = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]

Positions = Annotated[bool | Literal["sincos", "sincos_moco"], BeforeValidator(_positions)]
Fused = Annotated[Literal["auto", "apex", "cpu_adam"] | bool, BeforeValidator(_fused)]


def describe(annotation: Any) -> str:
    """The type of a field in words, for ``fastmim config keys``."""
    words = {Size: "integer or [height, width]", IntOrInts: "integer or list", PathOrPaths: "text or list"}
    words[NoData] = "number or nan"
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
