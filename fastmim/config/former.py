"""Keys that the config no longer has: files of earlier versions, and what people still type, mean the same."""

from __future__ import annotations

from typing import Any

from fastmim.config.messages import show

TENSORBOARD = ("output", "tensorboard")
"""Became ``output.loggers``: true is ``[tensorboard]``, false ``[]``."""
FORMER = {TENSORBOARD}
"""(section, key) of each."""


def translated(tree: dict[str, Any]) -> dict[str, Any]:
    """One layer of a config (a file, or all overrides) with today's keys.

    Raises:
        ValueError: a former key with a value that it did not take, or beside the one that it became.
    """
    output = tree.get("output")
    if not isinstance(output, dict) or "tensorboard" not in output:
        return tree
    rest = {key: value for key, value in output.items() if key != "tensorboard"}
    value = output["tensorboard"]
    if not isinstance(value, bool) or "loggers" in rest:
        raise ValueError(f"output.tensorboard={show(value)}: no key any more; use output.loggers=[tensorboard] or []")
    return {**tree, "output": {**rest, "loggers": ["tensorboard"] if value else []}}
