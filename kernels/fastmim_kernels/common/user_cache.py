"""JSON files of what was found out on this machine, in the user's cache; compressed if they end in ``.gz``."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any


def cache_file(name: str) -> Path:
    """Where the file of this name lies: ``$XDG_CACHE_HOME/fastmim``, or ``~/.cache/fastmim``.

    A user without a home, such as a number that a container is given, has a folder among the temporary files.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return folder / "fastmim" / name


def read_cache(path: Path) -> Any:
    """What it holds; None where it is not there or not JSON."""
    try:
        text = path.read_bytes()
        return json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)
    except (OSError, ValueError, EOFError, zlib.error):
        return None


def write_cache(path: Path, value: Any) -> None:
    """Write it as a whole, so that processes that write at once leave the file of one of them.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    text = (json.dumps(value, indent=1) + "\n").encode()
    partial.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    partial.replace(path)
