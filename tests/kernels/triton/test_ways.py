"""Each way to make a product with more work behind it: the same values, whichever is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmim_kernels.linear import on_triton as linear
from fastmim_kernels.linear import policy
from fastmim_kernels.linear.policy import APART, FUSED, WIDE
from fastmim_kernels.mlp import on_triton as mlp
from tests.kernels.triton.test_linear_gelu import BF16, F32, judge, judge_forward, judge_gradient, make

pytestmark = pytest.mark.usefixtures("poison")

WHOLE, PARTIAL = (128, 64, 256), (150, 72, 200)


@pytest.fixture(params=[FUSED, WIDE, APART])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that every product takes; narrow matrices have no wide one."""
    def way(*args: Any) -> str:
        return request.param if request.param in args[-1]() else FUSED

    monkeypatch.setattr(policy, "way", way)
    return request.param


@pytest.mark.parametrize("shape, dtype", [(WHOLE, BF16), (PARTIAL, BF16), (PARTIAL, F32)])
def test_around_a_gelu(taken: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    x, weight, bias, back, pre = (t[name] for name in ("x", "weight", "bias", "back", "pre"))
    z, out = mlp.hidden(x, weight, bias, pre=True, gelu=True)
    judge_forward((z, out), x, weight, bias)
    none, alone = mlp.hidden(x.view(2, -1, x.shape[1]), weight, bias, pre=False, gelu=True)
    again, _ = mlp.hidden(x, weight, bias, pre=True, gelu=False)
    assert torch.equal(alone.flatten(0, 1), out) and torch.equal(again, z) and none.numel() == 0
    judge_gradient(mlp.hidden_gradient(x, back, pre, True), x, back, pre)
    assert mlp.hidden_gradient(x, back, pre, False)[1].numel() == 0


@pytest.mark.parametrize("shape, dtype", [(WHOLE, BF16), (PARTIAL, F32)])
def test_gradients_of_a_layer(taken: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    grad, x, weight = t["x"], t["pre"], t["back"]
    kept = x.clone()
    dx = linear.input_gradient(grad, weight, x)
    judge(dx, grad @ weight + x, grad.double() @ weight.double() + x.double())
    assert torch.equal(x, kept), "the other reader's gradient stays as it is"
    dw, d_bias = linear.parameter_gradients(grad, x, F32, True)
    judge(dw, (grad.t() @ x).float(), grad.double().t() @ x.double())
    judge(d_bias, grad.sum(0).float(), grad.double().sum(0))
