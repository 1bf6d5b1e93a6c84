"""linear: the CPU's products against float64, gradients in the parameters' dtype, registration."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastmim_kernels as fk
from fastmim_kernels.common import cpu
from fastmim_kernels.linear import on_torch

# rows, in, out
SHAPES = {"few rows: the gradient is copied": (5, 7, 640), "short rows: copied": (300, 24, 33),
          "long rows: not copied": (300, 16, 520), "one row, one channel": (1, 1, 1)}


def make(name, dtype, bias=True):
    m, k, n = SHAPES[name]
    g = torch.Generator().manual_seed(m + n)
    x, grad = torch.randn(m, k, generator=g).to(dtype), torch.randn(m, n, generator=g).to(dtype)
    weight, b = torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    return (x.view(1, m, k), weight, b if bias else None), grad.view(1, m, n)


def run(impl, inputs, grad, dtype=None):
    leaves = [None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
    out = fk.linear(*leaves, impl=impl)
    out.backward(grad.to(out.dtype))
    for leaf in leaves:
        assert leaf is None or leaf.grad.dtype == leaf.dtype
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf is not None)]


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype, bias):
    (x, weight, b), grad = make(name, dtype, bias)
    # The truth is the product of what both get to see: weights in the dtype of x.
    low = (x, weight.to(dtype), None if b is None else b.to(dtype))
    truth = run("reference", low, grad, torch.float64)
    both = (run(impl, (x, weight, b), grad) for impl in ("torch", "reference"))
    for ours, plain_torch, exact in zip(*both, truth, strict=True):
        floor = torch.finfo(torch.float32).eps * max(rms(exact), 1e-3)
        assert rms(ours - exact) <= 2 * rms(plain_torch - exact) + floor


@pytest.mark.parametrize("name", SHAPES)
def test_a_weight_gradient_that_is_cast_in_parts_is_the_same(name, monkeypatch):
    (x, weight, _), grad = make(name, torch.bfloat16)
    monkeypatch.setattr(on_torch, "CAST", 3 * x.shape[-1])  # three rows at a time; one where there is one
    found = on_torch.weight_gradient(grad[0], x[0], torch.float32)
    truth = grad[0].double().t() @ x[0].double()
    assert found.dtype == torch.float32 and found.shape == weight.shape
    assert rms(found - truth) <= 2**-8 * rms(truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_registration_and_repeated_backward(dtype):
    inputs, grad = make("short rows: copied", dtype)
    args = *(t.clone().requires_grad_() for t in inputs), None, None, "torch"
    torch.library.opcheck(torch.ops.fastmim.linear.default, args)
    first, second = (run("torch", inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_casts_everything():
    inputs, grad = make("long rows: not copied", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run("torch", inputs, grad)
    expected = run("torch", (inputs[0].bfloat16(), *inputs[1:]), grad)
    assert torch.equal(cast[0], expected[0]) and torch.equal(cast[2], expected[2])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_copies_in_low_precision_change_nothing(impl):
    (x, weight, b), grad = make("short rows: copied", torch.bfloat16)
    found = []
    for low in ({}, {"low_weight": weight.bfloat16(), "low_bias": b.bfloat16()}, {"low_weight": weight.half()}):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b)]
        out = fk.linear(*leaves, **low, impl=impl)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    assert [t.dtype for t in found[1][2:]] == [torch.float32] * 2


def test_frozen_input_costs_no_product():
    inputs, grad = make("short rows: copied", torch.float32)
    weight = inputs[1].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        fk.linear(inputs[0], weight, impl="torch").backward(grad)
    m, k, n = SHAPES["short rows: copied"]
    assert counter.get_total_flops() == 2 * 2 * m * k * n


def test_message_names_the_shapes():
    with pytest.raises(ValueError, match=r"weight must be \(N, 4\)"):
        fk.linear(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="low_weight must have the shape"):
        fk.linear(torch.zeros(2, 4), torch.zeros(3, 4), low_weight=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="low_bias must have the shape"):
        fk.linear(torch.zeros(2, 4), torch.zeros(3, 4), low_bias=torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_processor_without_avx512_gets_torchs_own_products(monkeypatch, dtype):
    """oneDNN multiplies no bfloat16 there: it raises."""
    cpu.onednn_multiplies.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    def refuse(*args):
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    inputs, grad = make("short rows: copied", dtype)
    ours, exact = run("torch", inputs, grad), run("reference", inputs, grad)
    cpu.onednn_multiplies.cache_clear()
    for one, other in zip(ours, exact, strict=True):
        assert rms(one - other) <= 0.02 * rms(other)
