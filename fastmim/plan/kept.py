"""Traces of earlier plans, in the user's cache: those of the largest models take minutes."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

import fastmim
import fastmim_kernels
from fastmim_kernels.common.user_cache import cache_file, read_cache, write_cache

from .launch import Launch
from .trace import Footprint, Trace

MOST = 200
"""Files that stay; the oldest make room."""


def key_of(*facts: Any) -> str:
    """A name for what a trace depends on: ``facts``, which JSON can say, torch, and every line of our source."""
    return hashlib.sha256(json.dumps([facts, torch.__version__, _source()]).encode()).hexdigest()[:32]


def look_up(key: str) -> Footprint | None:
    """What was kept by this name; None where nothing was, or nothing that can be read."""
    found = read_cache(_file(key))
    try:
        return Footprint(*(_trace(found[name]) for name in ("small", "large")))
    except (TypeError, KeyError, ValueError, AssertionError):
        return None


def keep(key: str, footprint: Footprint) -> None:
    """Keep it for the next plan, where the cache can be written."""
    traces = {
        name: asdict(trace) | {"launches": [astuple(x) for x in trace.launches]}
        for name, trace in (("small", footprint.small), ("large", footprint.large))
    }
    try:
        write_cache(_file(key), traces)
        files = sorted(_file(key).parent.glob("*.json.gz"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MOST]:
            path.unlink(missing_ok=True)
    except OSError:
        return  # it is traced again then


def _file(key: str) -> Path:
    return cache_file(f"plan/{key}.json.gz")


def _trace(found: Any) -> Trace:
    launches = tuple(Launch(*row) for row in found["launches"])
    lists = {name: tuple(found[name]) for name in ("others", "grads")}
    return Trace(**{**found, **lists, "launches": launches})


@functools.cache
def _source() -> str:
    """Of both packages, all that a trace could depend on."""
    digest = hashlib.sha256()
    for package in (fastmim, fastmim_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
            digest.update(path.read_bytes())
    return digest.hexdigest()
