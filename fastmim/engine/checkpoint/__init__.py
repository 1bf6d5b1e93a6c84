"""Checkpoints: written and found again (save), read through (whole), in pieces of any number of ranks (shards), as one
file (convert)."""

from fastmim.engine.checkpoint.convert import consolidate, convert, export
from fastmim.engine.checkpoint.save import (
    check_same_run,
    find_resume,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside,
    step_of,
)
from fastmim.engine.checkpoint.whole import check_whole, whole_checkpoint

__all__ = [
    "check_same_run",
    "check_whole",
    "consolidate",
    "convert",
    "export",
    "find_resume",
    "list_checkpoints",
    "load_checkpoint",
    "read_state",
    "save_checkpoint",
    "set_aside",
    "step_of",
    "whole_checkpoint",
]
