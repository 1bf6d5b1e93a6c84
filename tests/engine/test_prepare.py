"""Kernels are compiled and tested before the first step on a GPU, by one rank of a machine for all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastmim.engine import distributed, prepare
from fastmim.engine.distributed import World
from fastmim.engine.dry_step import dry_step
from fastmim.objectives import create_objective
from fastmim_kernels.check import compile_ahead, self_test
from fastmim_kernels.check.launches import Launch, launches_of

TINY = dict(name="swinv2", img_size=48, patch_size=4, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=6)
build = partial(create_objective, "simmim", encoder=TINY)


class Watched:
    """What was done, in order; ``compiled`` holds the launches."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.compiled: list[Launch] = []
        self.fails: BaseException | list[str] = []

    def compile_ahead(self, launches: list[Launch], progress: Callable[[int, int], None]) -> list[str]:
        self.order.append("compile")
        self.compiled = list(launches)
        if isinstance(self.fails, BaseException):
            raise self.fails
        return self.fails


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A machine with a GPU, to all appearance, whose kernels are neither compiled nor run."""
    found = Watched()
    monkeypatch.setattr(prepare, "no_triton", lambda device: "")
    monkeypatch.setattr(compile_ahead, "compile_ahead", found.compile_ahead)
    monkeypatch.setattr(distributed, "barrier", lambda: found.order.append("barrier"))
    monkeypatch.setattr(self_test, "run", lambda dtypes, device: found.order.append(f"test {dtypes}"))
    monkeypatch.setattr(self_test, "request", lambda dtypes: None)
    return found


def world(rank: int = 0, device: str = "cuda") -> World:
    return World(rank=rank, size=2, local_rank=rank, device=torch.device(device))


def run(watched: Watched, *, impl: str = "auto", precision: str = "bf16", on: World | None = None,
        make: Callable[[], Any] = build) -> list[str]:
    prepare.prepare_kernels(make, impl=impl, batch=4, precision=precision, low_weights=False, world=on or world())
    return watched.order


def kinds(launches: list[Launch]) -> list[Any]:
    return [compile_ahead.specialisation(launch) for launch in launches]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_one_rank_compiles_what_a_step_requests(precision: str, watched: Watched) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    before = torch.get_rng_state()
    assert run(watched, precision=precision) == ["compile", "barrier", f"test {[dtype]}"]
    assert torch.equal(torch.get_rng_state(), before), "the run draws what it would have drawn"
    assert kinds(watched.compiled) == kinds(launches_of(lambda: dry_step(build, 4, precision=precision)))
    products = [launch for launch in watched.compiled if launch.op == "fastmim::mlp"]
    assert products and all(launch.args[0].dtype == dtype for launch in products)


def test_the_others_wait(watched: Watched) -> None:
    assert run(watched, on=world(rank=1)) == ["barrier", "test [torch.bfloat16]"]


@pytest.mark.parametrize("impl, device", [("torch", "cuda"), ("reference", "cuda"), ("auto", "cpu")])
def test_nothing_to_prepare(impl: str, device: str, watched: Watched) -> None:
    assert run(watched, impl=impl, on=world(device=device)) == []


def test_an_explicit_triton_is_not_tested(watched: Watched) -> None:
    assert run(watched, impl="triton") == ["compile", "barrier"]


def test_failures_are_named_and_end_nothing(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.fails = ["mlp/linear_gelu_kernel: RuntimeError: ptxas"]
    with caplog.at_level(logging.WARNING, "fastmim"):
        assert run(watched)[-1] == "test [torch.bfloat16]"
    assert [r.message for r in caplog.records] == ["Triton kernel mlp/linear_gelu_kernel: RuntimeError: ptxas"]


def test_a_step_that_cannot_be_traced_is_not_compiled_ahead(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    def impossible() -> Any:
        return torch.ones(2).sum().item()

    with caplog.at_level(logging.WARNING, "fastmim"):
        assert run(watched, make=impossible) == ["barrier", "test [torch.bfloat16]"]
    assert "the step cannot be traced (DataDependentOutputException" in caplog.text


def test_an_interrupt_releases_the_others(watched: Watched) -> None:
    watched.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(watched)
    assert watched.order == ["compile", "barrier"]
