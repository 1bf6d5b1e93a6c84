"""Pretraining objectives: ``forward(images, mask) -> {"loss": …}``, each imported when it is asked for."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .base import Objective

OBJECTIVES = {
    "simmim": "simmim:SimMIM",
    "ibot": "ibot:IBOT",
    "dino": "dino:DINO",
    "moco": "moco:MoCo",
    "classify": "classify:Classify",
}
"""Name → module of this package and class in it."""

__all__ = ["OBJECTIVES", "Objective", "create_objective", "find_objective"]


def create_objective(name: str, *, encoder: Mapping[str, Any], **kwargs: Any) -> Any:
    """Build an objective, which owns its encoder and head.

    Args:
        name: A key of :data:`OBJECTIVES`, or ``package.module:Class``, see :func:`find_objective`.
        encoder: Keyword arguments of :func:`fastmim.models.create_encoder`; ``name`` is a family ("swin",
            "swinv2", "vit") or a size such as "swinv2_base".
        kwargs: Arguments of the objective, for SimMIM see :class:`fastmim.objectives.simmim.SimMIM`.

    Returns:
        The :class:`Objective`.

    Raises:
        ValueError: Unknown objective, encoder or argument value.
    """
    return find_objective(name)(encoder=encoder, **kwargs)


def find_objective(name: str) -> type[Objective]:
    """The class of a known name, or of an import path ``package.module:Class``.

    Such a module is found on ``sys.path``, to which the working directory is appended; the class must be an
    :class:`Objective`.

    Raises:
        ValueError: ``name=…: what; fix`` in one line.
    """
    if ":" in name:
        return _imported(name)
    if name not in OBJECTIVES:
        hint = _nearest(name, OBJECTIVES)
        known = ", ".join(OBJECTIVES)
        raise ValueError(f"name={name!r}: unknown objective{hint} (use {known}, or package.module:Class of your own)")
    module, _, attribute = OBJECTIVES[name].partition(":")
    found: type[Objective] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found


def _imported(name: str) -> type[Objective]:
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(path)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        # What is missing inside the module is a fault of its own, and keeps its traceback.
        missing = error.name if isinstance(error, ModuleNotFoundError) else path
        if missing is None or not f"{path}.".startswith(f"{missing}."):
            raise
        raise ValueError(
            f"name={name!r}: there is no module {path!r}; give package.module:Class, "
            "found on PYTHONPATH or from the working directory"
        ) from None
    found: Any = getattr(module, attribute, None)
    classes = [key for key, value in vars(module).items() if _is_objective(value)]
    if not _is_objective(found):
        hint = _nearest(attribute, classes) or f"; it has {', '.join(classes) or 'none'}"
        raise ValueError(f"name={name!r}: {path} has no Objective of that name{hint}")
    checked: type[Objective] = found
    return checked


def _is_objective(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Objective) and value is not Objective


def _nearest(name: str, choices: Any) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
