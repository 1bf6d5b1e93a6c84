"""Results of finished parts, one file each, and what makes an old result count for this run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, harness
from benchmarks.proof.part import Part

SOURCES = ("fastmim", "kernels", "benchmarks")
LIBRARIES = ("torch", "triton", "timm", "safetensors", "numpy")


@dataclasses.dataclass
class Result:
    """What is kept of a part."""

    part: str
    passed: bool
    reason: str
    """Why it has not passed."""
    seconds: float
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    key: str = ""
    where: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: str = ""
    """The clone that it was measured beside."""


def machine() -> dict[str, str]:
    """Device and versions. It touches CUDA: to be called in a process of its own."""
    on_gpu = torch.cuda.is_available()
    found = {"device": "cuda" if on_gpu else "cpu", "name": torch.cuda.get_device_name() if on_gpu else ""}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def key(machine: dict[str, str], dry: bool) -> str:
    """A hash of every source file, the machine and the libraries: results under another key are not trusted.

    A commit alone would not see changes that are not committed, and a copy of a checkout may come without it.
    """
    digest = hashlib.sha256(json.dumps([machine, dry], sort_keys=True).encode())
    for folder in SOURCES:
        for path in sorted((harness.ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(harness.ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def complete(result: Result, key: str, machine: dict[str, str], commit: str | None, reference: Path | None = None
             ) -> Result:
    """With the key and the reference, and in every row the columns that say where and when it was measured."""
    where = harness.environment() | ({"machine": machine["name"]} if machine["name"] else {})
    where |= {"commit": commit} if commit else {}
    rows = [{"device": machine["device"], **row, **where} for row in result.rows]
    return dataclasses.replace(result, key=key, rows=rows, where=where, reference=_named(reference))


def finished(result: Result, part: Part, key: str, reference: Path | None) -> bool:
    """Whether the part need not run again: it has passed, beside the reference too where one is given now."""
    lacks = part.reference and reference is not None and result.reference != _named(reference)
    return result.key == key and result.passed and not lacks


def _named(reference: Path | None) -> str:
    return "" if reference is None else str(reference.resolve())


def path_of(folder: Path, part: str) -> Path:
    return folder / "parts" / f"{part}.json"


def write(folder: Path, result: Result) -> None:
    """A result file is whole or as it was: a run that is killed leaves no half of one."""
    command.write_whole(path_of(folder, result.part), json.dumps(dataclasses.asdict(result), indent=1))


def read(folder: Path, parts: Sequence[Part]) -> dict[str, Result]:
    """Part → its result, of those that have one. A file that is no result counts as none."""
    found = {}
    for part in parts:
        try:
            found[part.name] = Result(**json.loads(path_of(folder, part.name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return found
