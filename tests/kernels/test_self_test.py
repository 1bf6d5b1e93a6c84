"""The self-test that decides at first use whether ``impl="auto"`` takes a Triton kernel on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmim_kernels as fk
from fastmim_kernels.check import self_test
from fastmim_kernels.check.examples import SHIPPED, SMALL, Case
from fastmim_kernels.common import define_op, dispatch

CPU = torch.device("cpu")


def case_of(op: str) -> Case:
    return next(case for case in SMALL if case.op == op)


def copies() -> list[Case]:
    return [case for case in SMALL if case.op == "low_copies"]


CASE = case_of("gelu")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU of capability 9.0 that nobody tested yet."""
    monkeypatch.setattr(self_test, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "no_triton", lambda device: "")
    monkeypatch.setattr(self_test, "_failures", {})
    monkeypatch.setattr(dispatch, "_failed", {})
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


def chosen(impl: str = "auto", dtype: torch.dtype = torch.bfloat16) -> str:
    functions: dict[str, Any] = {name: name for name in ("triton", "torch", "reference")}
    return dispatch.resolve("gelu", impl, functions, CPU, dtype)  # type: ignore[return-value]


def test_a_right_kernel_is_tested_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("right")
    monkeypatch.setitem(self_test.OPS, "gelu", kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen() for _ in range(3)] == ["triton"] * 3
        assert kernel.calls == 1
        assert chosen(dtype=torch.float32) == "triton" and kernel.calls == 2


@pytest.mark.parametrize("kind, why", [("does not compile", "RuntimeError: PTX was compiled"),
                                       ("wrong gradient", "error 0.01"),
                                       ("nan in bfloat16", "in bfloat16: error inf of")])
def test_a_broken_kernel_falls_back_with_one_warning(kind: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(self_test.OPS, "gelu", Kernel(kind))
    with pytest.warns(RuntimeWarning, match="gelu failed its self-test in bfloat16 on sm_90") as caught:
        assert [chosen() for _ in range(3)] == ["torch"] * 3
    assert len(caught) == 1 and why in str(caught[0].message)
    assert chosen("triton") == "triton", "an explicit choice never falls back"


def test_a_failure_in_one_dtype_leaves_the_others_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the op itself asks: by the dtype of the call; the warning names op, dtype, what was compared and the error."""
    monkeypatch.setitem(self_test.OPS, "gelu", Kernel("nan in bfloat16"))
    x = torch.zeros(2, 3, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picked = {dtype: dispatch.picks_triton("gelu", "auto", CPU, define_op.dtype_of((x.to(dtype), None)))
                  for dtype in self_test.DTYPES}
    assert picked == {torch.float32: True, torch.bfloat16: False, torch.float16: True}
    assert [str(w.message).split(": ", 1)[1] for w in caught] == [
        "the Triton kernel of gelu failed its self-test in bfloat16 on sm_90 and impl='auto' falls back to torch for "
        "that dtype: gelu (bias) in bfloat16: error inf of output 0 against the float64 oracle, at most "
        f"{self_test.judge(CASE, CPU, torch.bfloat16, 'triton').limit:.2g} is expected"]


def test_dtype_of_a_call() -> None:
    """The low one among its tensors and dtypes: a float32 stream and parameters do not hide it."""
    wide, low = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert define_op.dtype_of((wide, low, wide, "pre", 1e-5)) == torch.bfloat16
    assert define_op.dtype_of(([wide, wide], torch.float16)) == torch.float16, "copies of float32 weights"
    assert define_op.dtype_of((wide, None, torch.float32, 3)) == torch.float32


def test_run_tests_up_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op in the dtypes asked for, those that know only float32 in that; later calls go by what was found."""
    monkeypatch.setattr(self_test, "no_triton", lambda device: "")
    monkeypatch.setattr(self_test, "CASES", (CASE, case_of("cpb_bias"), *copies()))
    kernel = Kernel("nan in bfloat16")
    monkeypatch.setitem(self_test.OPS, "gelu", kernel)
    for name in ("cpb_bias", "low_copies"):
        original = getattr(fk, name)
        monkeypatch.setitem(self_test.OPS, name, lambda *args, impl, original=original, **kwargs: original(
            *args, impl="torch" if impl == "triton" else impl, **kwargs))
    with pytest.warns(RuntimeWarning, match="gelu failed"):
        assert chosen() == "torch"
    kernel.kind = "right"
    results = self_test.run([torch.bfloat16], CPU)
    assert [(r.op, r.variant, r.dtype) for r in results] == [
        ("gelu", "bias", torch.bfloat16), ("cpb_bias", "", torch.float32), ("low_copies", "bfloat16", torch.bfloat16)]
    assert not any(r.failure for r in results)
    calls = kernel.calls
    assert chosen() == "triton" and kernel.calls == calls


def test_no_test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"gelu cannot run while .* call fastmim_kernels.check.self_test.run\(\)"):
        self_test.failure("gelu", torch.float32, torch.device("cuda"))
    assert not self_test._failures


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="device='cpu': the self-test needs a device that runs Triton kernels"):
        self_test.run(device="cpu")


def test_no_gpu_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only claim to be on a GPU, as a trace has them, on a machine without one."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {self_test.failure("gelu", torch.float32, device) for device in (torch.device("cuda"), CPU)} == {""}
    assert not self_test._failures


def test_within_a_trace_the_test_sees_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("wrong gradient")
    monkeypatch.setitem(self_test.OPS, "gelu", kernel)
    with FakeTensorMode(), torch.no_grad(), pytest.warns(RuntimeWarning, match="error 0.01"):
        assert chosen() == "torch"
    assert kernel.calls == 1


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("around", [
    torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16), partial(torch.device, "meta"),
    torch.autograd.graph.save_on_cpu, partial(default_dtype, torch.bfloat16), partial(default_dtype, torch.float64)])
@pytest.mark.parametrize("op", ["gelu", "residual_norm", "unshuffle"])
def test_whoever_asks_first_gets_the_same_answer(op: str, around: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is kept for the process: it must not depend on what the first call happens to be within."""
    original = self_test.OPS[op]
    monkeypatch.setattr(self_test, "CASES", (case_of(op),))
    monkeypatch.setitem(self_test.OPS, op, lambda *args, impl, **kwargs: original(
        *args, impl="torch" if impl == "triton" else impl, **kwargs))
    with around():
        assert self_test.failure(op, torch.float32, CPU) == ""


@pytest.mark.parametrize("kind", ["right", "does not compile"])
def test_compiled_without_a_graph_break(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler asks once, while it traces, and the answer is a constant of the graph."""
    monkeypatch.setitem(self_test.OPS, "gelu", Kernel(kind))
    functions = {"triton": lambda x: x + 1, "torch": lambda x: x - 1}

    def function(x: Tensor) -> Tensor:
        return dispatch.resolve("gelu", "auto", functions, x.device, x.dtype)(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()  # an answer is no guard: what the other parameter compiled would be reused
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert [compiled(torch.zeros(())).item() for _ in range(2)] == [1.0 if kind == "right" else -1.0] * 2
    assert set(self_test._failures) == {("gelu", torch.float32, (9, 0))}


NORMS = ("post, 2816 channels", "post, merged, drop path", "pre, bias", "pre, bias, last", "pre, gamma, last")


@pytest.mark.parametrize("case", [case for case in SHIPPED if case.variant in NORMS], ids=lambda case: case.variant)
def test_a_right_norm_is_within_the_limits(case: Case) -> None:
    """One that computes in float32 and keeps a bfloat16 stream, as torch's does here and the kernel on a GPU."""
    assert not self_test.judge(case, CPU, torch.bfloat16, "torch").failure
