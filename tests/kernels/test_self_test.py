"""The self-test that decides at first use whether ``impl="auto"`` takes a Triton kernel on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmim_kernels as fk
from fastmim_kernels.check import self_test
from fastmim_kernels.common import dispatch

CPU = torch.device("cpu")
CASE = next(case for case in self_test.CASES if case.op == "gelu")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU of capability 9.0 that nobody tested yet."""
    monkeypatch.setattr(self_test, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "no_triton", lambda device: "")
    monkeypatch.setattr(self_test, "_failures", {})
    monkeypatch.setattr(self_test, "CASES", (CASE,))


class Kernel:
    """gelu whose "triton" is made up; counts how often that ran."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls, self.original = kind, 0, fk.gelu

    def __call__(self, x: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
        if impl != "triton":
            return self.original(x, bias, impl=impl)
        self.calls += 1
        if self.kind == "does not compile":
            raise RuntimeError("PTX was compiled\\nwith something else")
        out = self.original(x, bias, impl="torch")
        if self.kind == "wrong gradient":
            return out + 0.01 * (out - out.detach())
        return out * float("nan") if self.kind == "nan in bfloat16" and x.dtype == torch.bfloat16 else out


def chosen(impl: str = "auto", op: str = "gelu") -> str:
    functions: dict[str, Any] = {name: name for name in ("triton", "torch", "reference")}
    return dispatch.resolve(op, impl, functions, CPU)  # type: ignore[return-value]


def test_a_right_kernel_is_tested_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("right")
    monkeypatch.setitem(self_test.OPS, "gelu", kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen() for _ in range(3)] == ["triton"] * 3
    assert kernel.calls == len(self_test.DTYPES)


@pytest.mark.parametrize("kind, why", [("does not compile", "RuntimeError: PTX was compiled"),
                                       ("wrong gradient", "error 0.01"), ("nan in bfloat16", "in torch.bfloat16")])
def test_a_broken_kernel_falls_back_with_one_warning(kind: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(self_test.OPS, "gelu", Kernel(kind))
    with pytest.warns(RuntimeWarning, match="gelu failed its self-test on sm_90") as caught:
        assert [chosen() for _ in range(3)] == ["torch"] * 3
    assert len(caught) == 1 and why in str(caught[0].message)
    assert chosen("triton") == "triton", "an explicit choice never falls back"


def test_no_gpu_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only claim to be on a GPU, as a trace has them, on a machine without one."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert self_test.failure("gelu", torch.device("cuda")) == self_test.failure("gelu", CPU) == ""
    assert not self_test._failures


def test_within_a_trace_the_test_sees_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("wrong gradient")
    monkeypatch.setitem(self_test.OPS, "gelu", kernel)
    with FakeTensorMode(), torch.no_grad(), pytest.warns(RuntimeWarning, match="error 0.01"):
        assert chosen() == "torch"
    assert kernel.calls == 1


@pytest.mark.parametrize("kind", ["right", "does not compile"])
def test_compiled_without_a_graph_break(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler asks once, while it traces, and the answer is a constant of the graph."""
    monkeypatch.setitem(self_test.OPS, "gelu", Kernel(kind))
    functions = {"triton": lambda x: x + 1, "torch": lambda x: x - 1}

    def function(x: Tensor) -> Tensor:
        return dispatch.resolve("gelu", "auto", functions, x.device)(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()  # an answer is no guard: what the other parameter compiled would be reused
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert [compiled(torch.zeros(())).item() for _ in range(2)] == [1.0 if kind == "right" else -1.0] * 2
    assert set(self_test._failures) == {("gelu", (9, 0))}
