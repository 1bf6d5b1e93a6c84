"""Settings of a run as ``section.key``, as checkpoints and loggers keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Sections of keys as ``section.key``; an empty section has none."""
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in (values or {}).items()}


def section_of(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys of one section of :func:`flat` settings, without its name."""
    return {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}


def image_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """What an :class:`~fastmim.objectives.Objective` is told of its images, from the values of a data section.

    Those that it lacks, or that are null, are left to the objective.
    """
    found = {key: data[key] for key in ("mean", "std", "pixels") if data.get(key)}
    return found | {"has_gaps": data.get("no_data") is not None}
