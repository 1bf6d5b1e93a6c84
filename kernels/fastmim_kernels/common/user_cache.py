"""Small JSON files of what was found out on this machine, in the user's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cache_file(name: str) -> Path:
    """Where the file of this name lies: ``$XDG_CACHE_HOME/fastmim``, or ``~/.cache/fastmim``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastmim" / name


def read_cache(path: Path) -> Any:
    """What it holds; None where it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_cache(path: Path, value: Any) -> None:
    """Write it as a whole, so that processes that write at once leave the file of one of them.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
