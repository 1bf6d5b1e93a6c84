from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import patch_merge
from fastmim_kernels.patch_merge.op import OP, traffic
from tests.kernels.oracle import check

F32, BF16 = torch.float32, torch.bfloat16
# Even; odd in one edge, in both (padded tokens take part in the norm); a single token; 24 channels pad to 32.
SHAPES = [(2, 4, 6, 24), (1, 3, 4, 24), (2, 5, 7, 24), (1, 1, 1, 24)]
# (residual stream, result)
STREAMS = [(F32, F32), (F32, BF16), (BF16, BF16)]


def inputs_for(shape: tuple[int, ...], norm: bool) -> tuple[dict[str, Any], list[str]]:
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = {"x": normal(*shape) + 0.3}
    if norm:
        inputs |= {"weight": normal(4 * shape[-1]), "bias": normal(4 * shape[-1])}
    return inputs, list(inputs)


def with_impl(impl: str, out_dtype: torch.dtype) -> Callable[..., Tensor]:
    def run(**kwargs: Any) -> Tensor:
        out = torch.float64 if kwargs["x"].dtype == torch.float64 else out_dtype
        return patch_merge(**kwargs, impl=impl, out_dtype=out)
    return run


@pytest.mark.parametrize("stream, out", STREAMS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], norm: bool, stream: torch.dtype, out: torch.dtype) -> None:
    inputs, names = inputs_for(shape, norm)
    check(with_impl("torch", out), with_impl("reference", out), inputs, dict.fromkeys(names, F32) | {"x": stream},
          wrt=names)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_order_of_the_parts(impl: str) -> None:
    x = torch.arange(9.0).view(1, 3, 3, 1)
    expected = [[[0, 3, 1, 4], [2, 5, 0, 0]], [[6, 0, 7, 0], [8, 0, 0, 0]]]
    assert patch_merge(x, impl=impl)[0].tolist() == expected


def test_dtype_of_the_result() -> None:
    x = torch.zeros(1, 2, 2, 8)
    assert patch_merge(x).dtype == F32
    with torch.autocast("cpu", BF16):
        assert patch_merge(x).dtype == BF16
        assert patch_merge(x, out_dtype=F32).dtype == F32


def test_keeps_nothing_without_a_norm() -> None:
    x, weight = torch.randn(2, 4, 4, 8, requires_grad=True), torch.ones(32, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        patch_merge(x, impl="torch")
        assert sum(saved) == 0
        patch_merge(x, weight, weight * 0, impl="torch")
    assert sum(saved) == x.numel() + 2 * 8 + 32


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm: bool) -> None:
    inputs, _ = inputs_for((2, 3, 4, 8), norm)
    args = [inputs[n].float().requires_grad_() if n in inputs else None for n in ("x", "weight", "bias")]
    torch.library.opcheck(OP.forward.op, (*args, 1e-5, BF16, "torch"))


@pytest.mark.parametrize("norm", [False, True])
def test_compiles_without_graph_break(norm: bool) -> None:
    inputs, names = inputs_for((2, 3, 4, 8), norm)
    args = {n: inputs[n].float() for n in names}
    torch._dynamo.reset()
    compiled = torch.compile(patch_merge, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**args), patch_merge(**args))


def test_counts_no_matrix_product() -> None:
    with FlopCounterMode(display=False) as counter:
        patch_merge(torch.randn(1, 4, 4, 8, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 0


def test_traffic_of_odd_maps_writes_the_padding() -> None:
    assert traffic((2, 4, 4, 16), norm=False) == ((1024, 1024, 0), (1024, 1024, 0))
    forward, backward = traffic((1, 3, 3, 16), norm=True, itemsize=4)
    assert forward == (9 * 64 + 512, 4 * 128 + 32, 0)
    assert backward == (4 * 128 + 9 * 64 + 32 + 256, 9 * 64 + 512, 0)


@pytest.mark.parametrize("args, word", [
    ((torch.zeros(2, 4, 8),), "x must be"), ((torch.zeros(1, 2, 2, 4), torch.ones(16)), "weight and bias"),
    ((torch.zeros(1, 2, 2, 4), torch.ones(4), torch.ones(4)), "weight and bias")])
def test_wrong_shapes_are_named(args: tuple[Tensor, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        patch_merge(*args)
