"""Files without a name."""

from __future__ import annotations

import os
import tempfile


def memory_file() -> int:
    """A handle of a new empty file, in memory where the system has that: ``/dev/shm`` does not bound it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastmim-data")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
