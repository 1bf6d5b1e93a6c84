"""The kernels of ``distillation`` in the interpreter: chunks put together, every pairing, bytes as the closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmim_kernels import distillation, distillation_and_entropy
from fastmim_kernels.distillation import on_triton
from fastmim_kernels.distillation.op import OP, traffic
from tests.kernels.oracle import relative_error
from tests.kernels.test_distillation import SHAPES, TEMPS, check_all, golden_rows, inputs_for, operands

pytestmark = pytest.mark.usefixtures("poison", "shared_counters")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 codes a program, 64 of each of two teachers; some programs have fewer groups than others."""
    monkeypatch.setattr(on_triton, "CHUNK", 128)
    monkeypatch.setattr(on_triton, "processors", lambda device: 2)
    monkeypatch.setattr(on_triton, "BLOCKS", 3)


@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name: str) -> None:
    check_all(name, "triton", torch.float32)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name, dtype", [("rows", torch.bfloat16), ("rows with weights", torch.float16),
                                         ("views", torch.bfloat16), ("global crops alone", torch.float32)])
def test_several_chunks(name: str, dtype: torch.dtype) -> None:
    """A remainder of 44 codes, of 1, and none; the same bits twice. The entropy, too, is put together."""
    check_all(name, "triton", dtype)
    inputs = {n: v.to(dtype) if n in ("student", "teacher") else v for n, v in inputs_for(name).items()}
    truth = distillation_and_entropy(**{n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()},
                                     impl="reference")[1]
    assert relative_error(distillation_and_entropy(**inputs, impl="triton")[1], truth) < 1e-5


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["rows", "views"])
def test_huge_logits(name: str) -> None:
    """±10⁴: most chunks are nothing beside the one with the largest logit."""
    check_all(name, "triton", torch.float32, scale=1e4)


def test_golden_run_of_ibots_loss() -> None:
    rows, centres, stored, stored_centres = golden_rows("triton")
    np.testing.assert_allclose(rows, stored, rtol=1e-5)
    torch.testing.assert_close(centres, stored_centres, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["rows", "views"])
def test_rows_of_weight_0_are_not_read(name: str) -> None:
    inputs = {n: v.float() if isinstance(v, Tensor) else v for n, v in inputs_for(name).items()}
    weight = torch.ones(inputs["student"].shape[:-1])
    weight[..., 1] = 0  # one row, or all views of one image
    if name == "views":
        weight[3, 2] = 0
    expected = distillation(**inputs, weight=weight, impl="reference")
    inputs["student"][weight == 0] = float("nan")
    inputs["teacher"][..., 1, :] = float("nan")
    student = inputs["student"].requires_grad_()
    loss = distillation(**inputs, weight=weight, impl="triton")
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected)
    assert grad[weight == 0].eq(0).all() and grad[weight != 0].ne(0).any(-1).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, requires_grad=True)
    loss = distillation(student, torch.zeros(shape), torch.zeros(8), pairs="rows" if len(shape) == 2 else "views",
                        **TEMPS, impl="triton")
    assert loss.item() == 0 and torch.autograd.grad(loss, student)[0].shape == shape


def test_opcheck() -> None:
    torch.library.opcheck(OP.forward.op, operands("views", "triton"), test_utils=("test_schema", "test_faketensor"))


def views_call(direction: str) -> tuple[Callable[[], object], int]:
    student, teacher = torch.randn(5, 3, 2048).bfloat16(), torch.randn(2, 3, 2048)
    return call_of(direction, student, teacher, None), total(5, 2, 3, 2048, direction, teacher_itemsize=4,
                                                            weighted=False)


def rows_call(direction: str) -> tuple[Callable[[], object], int]:
    student, teacher = (torch.randn(1, 20, 1000).bfloat16() for _ in range(2))
    weight = torch.ones(1, 20)
    weight[:, ::4] = 0
    return call_of(direction, student, teacher, weight), total(1, 1, 20, 1000, direction, shown=0.75)


def total(*sizes: Any, **settings: Any) -> int:
    *sizes, direction = sizes
    return sum(traffic(*sizes, **settings)[direction == "backward"][:2])


def call_of(direction: str, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Callable[[], object]:
    args = (student, teacher, torch.zeros(student.shape[2]), weight, torch.tensor(0.1), torch.tensor(0.05))
    own = len(student) == 1
    kept = on_triton.forward(*args, own)[2:]
    return (lambda: on_triton.forward(*args, own)) if direction == "forward" else (
        lambda: on_triton.backward(torch.ones(()), *args, *kept, own))


@pytest.mark.parametrize("case", [rows_call, views_call], ids=["rows", "views"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_requested_bytes(direction: str, case: Any, byte_counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all groups: logits, centre and weights once; chunks leave a few words of each row."""
    monkeypatch.setattr(on_triton, "BLOCKS", 1)
    run, closed = case(direction)
    byte_counter.reset()
    run()
    assert closed * 0.98 <= byte_counter.total <= 1.02 * closed, (byte_counter.total, closed)
