"""Compilation ahead of the first step: once for each kernel, with a progress, told failures, and no hanging."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastmim_kernels.check.compile_ahead import compile_ahead  # noqa: E402
from fastmim_kernels.check.launches import Launch, Pointer  # noqa: E402


@triton.jit(do_not_specialize=["rows"])
def copy(p_x, p_y, rows, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n * rows), mask=o < n * rows)


@triton.jit
def broken(p_x, B: tl.constexpr):
    tl.store(p_x + tl.arange(0, B), nothing_of_this_name)  # noqa: F821


def launch(rows: int, n: int, offset: int = 0, block: int = 256) -> Launch:
    x, y = torch.empty(64)[offset:], torch.empty(64)
    return Launch(copy, (Pointer(x), Pointer(y), rows, n), {"B": block}, (1,), "fastmim::copies")


BROKEN = Launch(broken, (Pointer(torch.empty(1)),), {"B": 16}, (1,), "fastmim::breaks")


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Triton believes in a Hopper GPU and compiles for it, into an empty cache."""
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (copy, broken):
        kernel.device_caches.clear()
    yield tmp_path
    for kernel in (copy, broken):
        kernel.device_caches.clear()


def test_each_kernel_once_into_the_cache_on_disk(sm_90: Path) -> None:
    """Other sizes of the same kind, and sizes that the kernel asks not to be told, are no kernels of their own."""
    progress: list[tuple[int, int]] = []
    launches = [launch(3, 32), launch(1, 48), launch(16, 32), launch(3, 33), launch(3, 32, offset=1),
                launch(3, 32, block=128)]
    assert compile_ahead(launches, lambda done, of: progress.append((done, of)), workers=2) == []
    assert progress == [(i, 4) for i in range(1, 5)]
    assert len(list(sm_90.glob("*/copy.cubin"))) == 4


def test_a_kernel_that_does_not_compile_is_named_and_hides_no_other(sm_90: Path) -> None:
    failed = compile_ahead([BROKEN, launch(3, 32)], workers=2)
    assert len(failed) == 1 and failed[0].startswith("breaks/broken: ") and "nothing_of_this_name" in failed[0]
    assert len(list(sm_90.glob("*/copy.cubin"))) == 1


def test_a_compiler_that_hangs_is_left_behind() -> None:
    over = threading.Event()

    class Slow:
        params = ()
        fn = SimpleNamespace(__name__="slow")

        def warmup(self, grid: Any) -> None:
            over.wait(30)

    kernel: Any = Slow()
    try:
        failed = compile_ahead([Launch(kernel, (), {}, (1,), "fastmim::hangs")], workers=1, timeout=0.05)
    finally:
        over.set()
    assert failed == ["hangs/slow: not compiled after 0 s"]


@pytest.mark.parametrize("failures", [1, 2])
def test_what_fails_beside_others_is_tried_once_more_alone(failures: int) -> None:
    """CPython 3.11's ``ast.parse`` fails now and then where another thread reads source too; what is wrong, twice."""
    tried: list[int] = []

    class Unlucky:
        params = ()
        fn = SimpleNamespace(__name__="unlucky")

        def warmup(self, grid: Any) -> None:
            tried.append(1)
            if len(tried) <= failures:
                raise SystemError("AST constructor recursion depth mismatch (before=42, after=33)")

    kernel: Any = Unlucky()
    progress: list[tuple[int, int]] = []
    failed = compile_ahead([Launch(kernel, (), {}, (1,), "fastmim::luck")], lambda *done: progress.append(done), 2)
    assert failed == (["luck/unlucky: SystemError: AST constructor recursion depth mismatch (before=42, after=33)"]
                      if failures == 2 else [])
    assert len(tried) == 2 and progress == [(1, 1)]
