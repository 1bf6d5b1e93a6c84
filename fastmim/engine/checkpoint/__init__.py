"""Checkpoints: written and found again (save), in pieces of any number of ranks (shards), as one file (convert)."""

from fastmim.engine.checkpoint.convert import consolidate, convert
from fastmim.engine.checkpoint.save import (
    check_same_run,
    find_resume,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside,
)

__all__ = [
    "check_same_run",
    "consolidate",
    "convert",
    "find_resume",
    "list_checkpoints",
    "load_checkpoint",
    "read_state",
    "save_checkpoint",
    "set_aside",
]
