"""What is kept between calls must have its values whenever it is read."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmim_kernels.common.caches import MOST, keep_tensors
from fastmim_kernels.common.user_cache import cache_file, read_cache, write_cache


def test_what_is_made_in_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    @keep_tensors
    def ones(count: int) -> Tensor:
        return torch.ones(count)

    before, capturing = ones(2), [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert ones(2) is before, "what has its values already serves a graph too"
    inside = ones(3)
    capturing[0] = False
    after = ones(3)
    assert inside is not after and ones(3) is after


def test_what_a_graph_has_read_is_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    @keep_tensors
    def ones(count: int) -> Tensor:
        return torch.ones(count)

    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    alive = []
    for _ in range(2):  # of each of two graphs, between which the cache has forgotten it
        ones(2)
        capturing[0] = True
        alive.append(weakref.ref(ones(2)))
        capturing[0] = False
        ones.cache_clear()  # type: ignore[attr-defined]
    assert alive[0]() is not None and alive[1]() is not None and alive[0]() is not alive[1]()


def test_the_oldest_goes_first() -> None:
    made: list[int] = []

    @keep_tensors
    def note(i: int) -> int:
        made.append(i)
        return i

    for i in range(MOST + 1):
        note(i)
    note(1)
    note(0)
    assert made == [*range(MOST + 1), 0]


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a container's user is that is a number alone; ``expanduser`` raises there."""
    def homeless(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    write_cache(cache_file("found.json"), [1])
    assert read_cache(cache_file("found.json")) == [1] and list(tmp_path.rglob("found.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_file("found.json") == tmp_path / "own" / "fastmim" / "found.json"
