from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import gelu
from fastmim_kernels.mlp.gelu import OP, traffic
from tests.kernels.oracle import check

# 3x7 rows fill no tile, 40 columns pad to 64; one value.
SHAPES = [(3, 7, 40), (1, 1)]


def inputs_for(shape: tuple[int, ...], bias: bool) -> tuple[dict[str, Any], list[str]]:
    generator = torch.Generator().manual_seed(5)
    # Both tails, where 1 + erf cancels, and the middle.
    inputs = {"x": torch.randn(shape, generator=generator, dtype=torch.float64) * 3}
    if inputs["x"].numel() == 1:  # alone in a tail it would be judged by the absolute error of 1 + erf
        inputs["x"].fill_(1)
    if bias:
        inputs["bias"] = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return inputs, list(inputs)


def with_impl(impl: str) -> Callable[..., Tensor]:
    return lambda **kwargs: gelu(**kwargs, impl=impl)


def plain(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    inputs, names = inputs_for(shape, bias)
    check(with_impl("torch"), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names, plain=plain)


def test_the_oracle_is_pytorchs_gelu() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(gelu(x, impl="reference"), F.gelu(x), rtol=1e-12, atol=1e-14)


def test_keeps_x_only() -> None:
    x, bias = torch.randn(64, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        gelu(x, bias)
    assert sum(saved) == 64 * 32 + 32


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    inputs, _ = inputs_for((2, 3, 16), bias)
    args = [inputs[n].float().requires_grad_() if n in inputs else None for n in ("x", "bias")]
    torch.library.opcheck(OP.forward.op, (*args, "torch"))
    detached = [None if a is None else a.detach() for a in args]
    torch.library.opcheck(OP.backward.op, (detached[0] * 2, *detached, "torch"))


def test_compiles_without_graph_break() -> None:
    x, bias = torch.randn(3, 8), torch.randn(8)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(gelu, fullgraph=True, backend="aot_eager")(x, bias), gelu(x, bias))


def test_counts_no_matrix_product() -> None:
    with FlopCounterMode(display=False) as counter:
        gelu(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 0


def test_traffic() -> None:
    assert traffic(10, 64) == ((1280 + 256, 1280, 0), (2560 + 256, 1280 + 256, 0))
    assert traffic(10, 64, itemsize=4, bias=False) == ((2560, 2560, 0), (5120, 2560, 0))


def test_wrong_bias_is_named() -> None:
    with pytest.raises(ValueError, match="bias must be"):
        gelu(torch.zeros(2, 4), torch.zeros(3))
