"""Counts, and that every command to install something is true where it is read."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fastmim import wording

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "count, words", [(0, "0 images"), (1, "1 image"), (2, "2 images"), (12345, "12,345 images")]
)
def test_plural(count: int, words: str) -> None:
    assert wording.plural(count, "image") == words
    assert wording.plural(1, "entry", "entries") == "1 entry" and wording.plural(3, "entry", "entries") == "3 entries"


_NOUNS = r" (\w+ )?(images|files|steps|epochs|passes|ranks|cores|channels|tensors|blocks|GPUs|workers|processes)\b"
# Two or more where they are said, "of the first N", or no count at all.
_NEVER_ONE = {
    "in_chans channels", "channels channels", "self._met files", "_SUBSTITUTES files", "len(found) images",
    "world.size ranks", "world_size ranks", "one.num_images images", "len(bad) tensors", "looked images",
    "SEEN images", "rate images", "of steps", "len(blocks) blocks", "len(self.names) tensors",
    "option.images_per_sec images", "facts['images_per_sec'] images",
    "%d bad images", "%d files", "%d images", "facts.ranks processes", "len(expected) test tensors",
}  # fmt: skip


def test_counts_of_things_are_said_by_plural() -> None:
    """A number before a noun, in an f-string or for a log, is ``plural(…)``: of one, "1 images" is wrong."""
    found = set()
    for path in (ROOT / "fastmim").rglob("*.py"):
        for text in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found.update(where[0] for where in re.finditer("%d" + _NOUNS, text.value))
            parts = text.values if isinstance(text, ast.JoinedStr) else []
            for count, words in zip(parts, parts[1:], strict=False):
                noun = re.match(_NOUNS, words.value) if isinstance(words, ast.Constant) else None
                if noun and isinstance(count, ast.FormattedValue):
                    found.add(ast.unparse(count.value) + noun[0])
    assert not found - _NEVER_ONE


def test_in_a_checkout_the_extra_is_that_of_its_pyproject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wording, "_pip", lambda: "pip")
    monkeypatch.chdir(ROOT)
    assert wording.install_extra("profile") == 'pip install -e ".[profile]"'
    monkeypatch.chdir(tmp_path)  # there, "." would be another folder
    assert shlex.split(wording.install_extra("profile")) == ["pip", "install", "-e", f"{ROOT}[profile]"]


def test_elsewhere_the_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """fastmim is not on PyPI: `pip install fastmim[…]` would fetch nothing, or somebody else's package."""
    monkeypatch.setattr(wording, "_ROOT", tmp_path)
    monkeypatch.setattr(wording, "_pip", lambda: "pip")
    installed = [
        "torch>=2.10",
        'deepspeed>=0.19; extra == "zero"',
        'ninja; extra == "zero"',
        'matplotlib>=3.8; extra == "plots"',
        'fastmim[plots,zero]; extra == "demo"',
        'scikit-image>=0.22; (platform_system == "Linux") and extra == "demo"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: installed)
    assert wording.install_extra("zero") == 'pip install "deepspeed>=0.19" ninja'
    assert shlex.split(wording.install_extra("demo"))[2:] == [
        "matplotlib>=3.8", "deepspeed>=0.19", "ninja", "scikit-image>=0.22"
    ]  # fmt: skip


def test_pip_is_that_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        (tmp_path / "bin" / name).write_text("")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert wording.install_packages("rich") == "pip install rich"
    monkeypatch.setenv("PATH", "/nowhere")
    assert wording.install_packages("rich") == f"{tmp_path}/bin/python -m pip install rich"
    monkeypatch.chdir(tmp_path)
    assert wording.install_packages("rich") == "bin/python -m pip install rich"


def test_nothing_else_says_how_to_install() -> None:
    """One place makes these lines; the kernels, which stand alone, name packages of PyPI only."""
    files = [*(ROOT / "fastmim").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    said = {
        (path.name, found)
        for path in files
        if path.name != "wording.py"
        for found in re.findall(r"pip install [^\s)]+", path.read_text(encoding="utf-8"))
    }
    assert said == {("dispatch.py", "pip install triton"), ("errors.py", "pip install -e")}


def test_extras_that_are_named_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = {
        extra
        for path in (ROOT / "fastmim").rglob("*.py")
        for extra in re.findall(r"install_extra\(.(\w+).\)", path.read_text(encoding="utf-8"))
    }
    assert named == {"bands", "dali", "loggers", "onnx", "plots", "profile", "study", "zero"}
    assert all(f"\n{extra} = [" in text for extra in named)
