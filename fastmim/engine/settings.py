"""Settings of a run as ``section.key``, as checkpoints and loggers keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_SAMPLES = ("pixels", "no_data", "exif_orientation", "array", "channel_order")
"""Of a data section, beside what normalises them: how float samples are read."""


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


def image_facts(data: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder's file says of its images, from the values of a run's data section by key.

    ``mean``, ``std`` and ``interpolation``; with ``pixels: float32`` also how samples were read.
    """
    found = {key: data.get(key) for key in ("mean", "std", "interpolation")}
    if data.get("pixels") != "float32":
        return found
    return found | {key: data[key] for key in _OF_SAMPLES if data.get(key) is not None}
