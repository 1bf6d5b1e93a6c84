from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import mlp
from fastmim_kernels.mlp import on_torch
from fastmim_kernels.mlp.op import OP, traffic
from tests.kernels.oracle import check

F32, BF16 = torch.float32, torch.bfloat16
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


def inputs_for(shape: tuple[int, ...], hidden: int, out: int, biases: str = "12") -> tuple[dict[str, Any], list[str]]:
    generator = torch.Generator().manual_seed(11)
    c = shape[-1]

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    inputs = {"x": normal(*shape), "weight1": normal(hidden, c, scale=c**-0.5), "bias1": normal(hidden),
              "weight2": normal(out, hidden, scale=hidden**-0.5), "bias2": normal(out)}
    given = {n: t if n[-1] in biases or "bias" not in n else None for n, t in inputs.items()}
    return given, [n for n, t in given.items() if t is not None]


def with_impl(impl: str, recompute_fc1: bool = False) -> Callable[..., Tensor]:
    return lambda **kwargs: mlp(**kwargs, recompute_fc1=recompute_fc1, impl=impl)


def plain(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """What autocast runs: everything in the dtype of x."""
    low = [None if p is None else p.to(x.dtype) for p in (weight1, bias1, weight2, bias2)]
    return F.linear(F.gelu(F.linear(x, low[0], low[1])), low[2], low[3])


@pytest.mark.parametrize("x, parameters", [(F32, F32), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("recompute_fc1", [False, True])
# 3x5 rows and 1024: d bias is summed in two ways; 24 → 40 → 16: no two widths equal.
@pytest.mark.parametrize("shape, biases", [((3, 5, 24), "12"), ((1024, 24), "12"), ((7, 24), "1"), ((7, 24), "")])
def test_against_float64(shape: tuple[int, ...], biases: str, recompute_fc1: bool, x: torch.dtype,
                         parameters: torch.dtype) -> None:
    inputs, names = inputs_for(shape, 40, 16, biases)
    check(with_impl("torch", recompute_fc1), with_impl("reference"), inputs,
          dict.fromkeys(names, parameters) | {"x": x}, wrt=names, plain=plain)


@pytest.mark.parametrize("recompute_fc1", [False, True])
def test_autocast_keeps_parameter_dtypes(recompute_fc1: bool) -> None:
    inputs, names = inputs_for((6, 24), 40, 16)
    args = {n: inputs[n].float().requires_grad_() for n in names}
    with torch.autocast("cpu", BF16):
        out = mlp(**args, recompute_fc1=recompute_fc1)
        expected = F.linear(F.gelu(F.linear(args["x"], args["weight1"], args["bias1"])), args["weight2"],
                            args["bias2"])
    assert out.dtype == BF16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.float().sum(), list(args.values()))
    assert all(g.dtype == F32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("recompute_fc1", [False, True])
def test_weights_cast_by_the_caller_change_nothing(recompute_fc1: bool) -> None:
    inputs, names = inputs_for((6, 24), 40, 16)
    args = {n: inputs[n].float().requires_grad_() for n in names}
    args["x"] = args["x"].detach().bfloat16().requires_grad_()
    low = {f"low_{n}": args[n].bfloat16().detach() for n in ("weight1", "weight2")}
    outs = [mlp(**args, **given, recompute_fc1=recompute_fc1, impl="torch") for given in ({}, low)]
    plain, given = ([out, *torch.autograd.grad(out.float().sum(), list(args.values()))] for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
    assert given[2].dtype == F32


def saved_sizes(function: Callable[[], Tensor]) -> list[int]:
    """Elements of what is kept for backward, storages counted once."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sorted(n for n in sizes.values() if n)


def test_keeps_input_and_pre_activation_only() -> None:
    inputs, names = inputs_for((100, 24), 40, 16)
    args = {n: inputs[n].float().requires_grad_() for n in names}
    parameters = [40, 16 * 40, 40 * 24]
    assert saved_sizes(lambda: mlp(**args, impl="torch")) == sorted([*parameters, 100 * 24, 100 * 40])
    assert saved_sizes(lambda: mlp(**args, impl="torch", recompute_fc1=True)) == sorted([*parameters, 100 * 24])


@pytest.mark.parametrize("change, kept", [({}, True), ({"KEPT_ACTIVATION": 100 * 40 - 1}, False),
                                          ({"KEPT_CHANNELS": 23}, False)])
def test_keeps_a_small_activation_of_narrow_bfloat16(change: dict[str, int], kept: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_torch, "onednn_multiplies", lambda dtype: True)
    inputs, names = inputs_for((100, 24), 40, 16)
    args = {n: inputs[n].bfloat16().requires_grad_() for n in names}

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mlp(**args, impl="torch").float().sum(), list(args.values()))

    expected = gradients()
    for name, value in change.items():
        monkeypatch.setattr(on_torch, name, value)
    own = [40, 16 * 40, 40 * 24, 100 * 24, 100 * 40]
    assert saved_sizes(lambda: mlp(**args, impl="torch")) == sorted([*own, *[100 * 40] * kept])
    assert saved_sizes(lambda: mlp(**args, impl="torch", recompute_fc1=True)) == sorted(own[:-1])
    assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_backward_twice_gives_the_same(dtype: torch.dtype) -> None:
    """Backward writes over its own buffers, never over what was kept."""
    inputs, names = inputs_for((9, 24), 40, 16)
    args = {n: inputs[n].to(dtype).requires_grad_() for n in names}
    out = mlp(**args)
    first = torch.autograd.grad(out.sum(), list(args.values()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(args.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype, recompute_fc1, biases", [(F32, False, "12"), (BF16, False, "1"), (BF16, True, "")])
def test_opcheck(dtype: torch.dtype, recompute_fc1: bool, biases: str) -> None:
    inputs, _ = inputs_for((2, 3, 16), 24, 8, biases)
    args = [None if inputs[n] is None else inputs[n].float().requires_grad_() for n in NAMES]
    args[0] = args[0].detach().to(dtype).requires_grad_()
    torch.library.opcheck(OP.forward.op, (*args, None, None, recompute_fc1, "torch"))


def test_compiles_without_graph_break() -> None:
    inputs, names = inputs_for((2, 3, 16), 24, 8)
    args = {n: inputs[n].float() for n in names}
    torch._dynamo.reset()
    assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(**args), mlp(**args))


@pytest.mark.parametrize("recompute_fc1", [False, True])
def test_counts_its_products(recompute_fc1: bool) -> None:
    inputs, names = inputs_for((2, 5, 16), 24, 8)
    args = {n: inputs[n].float().requires_grad_() for n in names}
    forward, backward = traffic(10, 16, 24, 8, recompute_fc1=recompute_fc1)
    with FlopCounterMode(display=False) as counter:
        out = mlp(**args, recompute_fc1=recompute_fc1)
    assert counter.get_total_flops() == forward[2] == 2 * 10 * 24 * (16 + 8)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward[2] == 4 * 10 * 24 * 24 + 2 * 10 * 16 * 24 * recompute_fc1


def test_traffic_is_the_sum_of_its_products() -> None:
    x, h, w = 100 * 8 * 4, 100 * 32 * 4, 32 * 8 * 4
    forward, backward = traffic(100, 8, 32, itemsize=4, param_itemsize=4, bias=False)
    assert forward[:2] == (x + w + h + w, 2 * h + x)
    assert backward[:2] == ((x + w + h) + (x + h) + (h + x) + (h + w), 2 * h + w + w + x)
    again, recomputed = traffic(100, 8, 32, itemsize=4, param_itemsize=4, bias=False, recompute_fc1=True)
    assert again[1] == forward[1] - h and recomputed[:2] == (backward[0] + x + w, backward[1] + h)
    low = traffic(100, 8, 32, itemsize=2, bias=False, low_weights=True)[0]
    cast = traffic(100, 8, 32, itemsize=2, bias=False)[0]
    assert (cast[0] - low[0], cast[1] - low[1]) == (2 * w, w)


@pytest.mark.parametrize("change, word", [
    ({"weight1": torch.zeros(6, 5)}, "weight1"), ({"weight2": torch.zeros(3, 5)}, "weight2"),
    ({"bias1": torch.zeros(4)}, "bias1"), ({"bias2": torch.zeros(6)}, "bias2"),
    ({"low_weight1": torch.zeros(4, 6)}, "low_weight1")])
def test_wrong_shapes_are_named(change: dict, word: str) -> None:
    args = {"x": torch.zeros(2, 4), "weight1": torch.zeros(6, 4), "bias1": torch.zeros(6),
            "weight2": torch.zeros(3, 6), "bias2": torch.zeros(3)}
    with pytest.raises(ValueError, match=word):
        mlp(**(args | change))
