"""An op that hands its input on gives the results and gradients of the op and a second reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmim_kernels as fk
from tests.kernels.oracle import check

F32, BF16 = torch.float32, torch.bfloat16
OPS: dict[str, tuple[Callable, Callable, dict[str, tuple[int, ...]]]] = {
    "linear": (fk.linear, fk.linear_and_input, {"weight": (24, 24), "bias": (24,)}),
    "mlp": (fk.mlp, fk.mlp_and_input, {"weight1": (40, 24), "bias1": (40,), "weight2": (24, 40), "bias2": (24,)})}


def inputs_for(name: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    return {n: torch.randn(size, generator=g, dtype=torch.float64) * (0.2 if n[0] == "w" else 1)
            for n, size in {"x": (3, 13, 24), **OPS[name][2]}.items()}


def both_readers(op: Callable, impl: str, handed_on: bool) -> Callable[..., Tensor]:
    """A residual stream: x plus the op of it."""
    def run(x: Tensor, **parameters: Any) -> Tensor:
        out, stream = op(x, **parameters, impl=impl) if handed_on else (op(x, **parameters, impl=impl), x)
        return out * 2 + stream
    return run


def check_both(name: str, impl: str, x: torch.dtype) -> None:
    plain, handing_on, _ = OPS[name]
    inputs = inputs_for(name)
    check(both_readers(handing_on, impl, True), both_readers(plain, "reference", False), inputs,
          dict.fromkeys(inputs, F32) | {"x": x}, wrt=list(inputs))


@pytest.mark.parametrize("x", [F32, BF16])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_against_float64(name: str, impl: str, x: torch.dtype) -> None:
    check_both(name, impl, x)


@pytest.mark.parametrize("name", OPS)
def test_either_reader_alone(name: str) -> None:
    plain, handing_on, _ = OPS[name]
    inputs = {n: t.float().requires_grad_() for n, t in inputs_for(name).items()}
    expected = torch.autograd.grad(plain(**inputs).sum(), list(inputs.values()))
    found = torch.autograd.grad(handing_on(**inputs)[0].sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    only, = torch.autograd.grad(handing_on(**inputs)[1].sum(), inputs["x"])
    assert torch.equal(only, torch.ones_like(only))


@pytest.mark.parametrize("name", OPS)
def test_a_stream_in_another_dtype_stays_as_it_is(name: str) -> None:
    inputs = {n: t.float() for n, t in inputs_for(name).items()}
    with torch.autocast("cpu", BF16):
        out, stream = OPS[name][1](**inputs)
    assert stream is inputs["x"] and out.dtype == BF16


@pytest.mark.parametrize("name", OPS)
def test_compiles_without_graph_break(name: str) -> None:
    op = OPS[name][1]
    inputs = {n: t.float().requires_grad_() for n, t in inputs_for(name).items()}

    def run(**inputs: Tensor) -> Tensor:
        out, stream = op(**inputs)
        return out + stream

    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(found, run(**inputs))
    torch.testing.assert_close(*(torch.autograd.grad(f.square().sum(), inputs["x"]) for f in (found, run(**inputs))))
