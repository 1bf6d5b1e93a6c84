"""Words that many messages share: counts, and how to install what is missing."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_NAME = "fastmim"


def plural(count: int, noun: str, several: str | None = None) -> str:
    """``1 image``, ``2 images``, ``10,000 images``; with ``several`` what it takes instead of an s."""
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def as_yaml(value: Any) -> str:
    """A setting as in YAML, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return " ".join(str(value).split()) or "''"


def install_packages(*requirements: str) -> str:
    """The command that installs packages of PyPI into the environment of this process."""
    return " ".join([_pip(), "install", *(f'"{one}"' if re.search(r"[^\w.\-]", one) else one for one in requirements)])


def install_extra(extra: str) -> str:
    """The command that installs one of our extras, which PyPI does not know: fastmim is not there.

    In a checkout its pyproject.toml says what the extra is; elsewhere the packages are those of the installed metadata.
    """
    if _is_checkout(_ROOT):
        where = "." if _here() == _ROOT else str(_ROOT)
        return f'{_pip()} install -e "{where}[{extra}]"'
    try:
        return install_packages(*_packages(extra))
    except metadata.PackageNotFoundError:
        return f'{_pip()} install ".[{extra}]" in a checkout'


def _is_checkout(root: Path) -> bool:
    try:
        return f'name = "{_NAME}"' in (root / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False


def _packages(extra: str) -> list[str]:
    """What the extra brings, those of other extras that it names included."""
    found: list[str] = []
    for line in metadata.requires(_NAME) or ():
        requirement, _, marker = line.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", marker):
            ours = re.match(rf"{_NAME}\[([^\]]+)\]", requirement)
            inner = [one for name in ours[1].split(",") for one in _packages(name.strip())] if ours else []
            found += inner if ours else [requirement.strip()]
    return list(dict.fromkeys(found))


def _pip() -> str:
    """``pip`` where the shell's is that of this process; else this Python's."""
    own, found = Path(sys.executable or "python"), shutil.which("pip")
    if found is not None and Path(found).parent == own.parent:
        return "pip"
    here = _here()
    return f"{own.relative_to(here) if here is not None and own.is_relative_to(here) else own} -m pip"


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # deleted
        return None
