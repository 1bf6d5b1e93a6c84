"""A branch and its norm as one node: the bits of the ops one by one, and op by op for whoever looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastmim_kernels as fk
from fastmim_kernels.branches import Attention, Norm, add_branches, attention, mlp

C, HEADS, WINDOW = 16, 2, 4
SHAPES = {"x": (2, 4, 8, C), "y": (2, 4, 8, C), "qkv": (3 * C, C), "qkv_bias": (3 * C,), "proj": (C, C),
          "branch_bias": (C,), "bias": (HEADS, WINDOW**2, WINDOW**2), "scale": (HEADS,), "weight": (C,),
          "norm_bias": (C,), "gamma": (C,), "fc1": (4 * C, C), "fc1_bias": (4 * C,), "fc2": (C, 4 * C)}
DROP = torch.tensor([0.0, 2.0])


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(*shape, generator=generator).mul(0.5).to(dtype).requires_grad_()
            for name, shape in SHAPES.items()}


def norm(t: dict[str, Tensor], order: str, merge: bool) -> Norm:
    gamma = t["gamma"] if order == "pre" else None
    return Norm(t["weight"], t["norm_bias"], t["branch_bias"], DROP, gamma, order, 1e-5, merge)


def together(t: dict[str, Tensor], which: str, order: str, shared: bool, impl: str) -> Any:
    """The chain; with ``shared`` y is the stream too, whose last map is then gathered."""
    attend = attention(Attention(t["qkv"], t["qkv_bias"], None, None, t["proj"], None, None, t["bias"], t["scale"]),
                       HEADS, (WINDOW, WINDOW), (2, 2))
    last = norm(t, order, shared and order == "post")
    links = {"attention": [(attend, last)],
             "mlp": [(mlp(t["fc1"], t["fc1_bias"], t["fc2"], None, None, None, False), last)]}
    links["both"] = [(attend, norm(t, order, False)), *links["mlp"]]
    return add_branches(t["x"], t["y"], links[which], one_stream=shared, impl=impl)


def apart(t: dict[str, Tensor], which: str, order: str, shared: bool, impl: str) -> Any:
    """The ops that the chain stands for."""
    x, y = t["x"], t["y"]
    for part in ("attention", "mlp") if which == "both" else (which,):
        if part == "mlp":
            branch, y = fk.mlp_and_input(y, t["fc1"], t["fc1_bias"], t["fc2"], None, impl=impl)
        else:
            qkv, y = fk.linear_and_input(y, t["qkv"], t["qkv_bias"], impl=impl)
            branch = fk.window_attention(qkv, t["bias"], num_heads=HEADS, window_size=WINDOW, shift_size=2,
                                         logit_scale=t["scale"], impl=impl)
            branch = fk.linear(branch, t["proj"], impl=impl)
        last = which != "both" or part == "mlp"
        how = norm(t, order, shared and order == "post" and last)._asdict()
        x, y = fk.residual_norm(y if shared else x, branch, how.pop("weight"), how.pop("bias"), **how, impl=impl)
    return x, y


def loss(found: tuple[Tensor, Tensor]) -> Tensor:
    added, out = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in found)
    return (added * torch.linspace(-1, 1, added.numel(), dtype=added.dtype).view(added.shape)).sum() + out.pow(2).sum()


def everything(run: Callable[..., Any], t: dict[str, Tensor], *case: Any) -> list[Tensor | None]:
    found = run(t, *case)
    return [*found, *torch.autograd.grad(loss(found), list(t.values()), allow_unused=True)]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(a is b is None or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
               for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order, shared", [("pre", False), ("post", False), ("post", True)])
@pytest.mark.parametrize("which", ["attention", "mlp", "both"])
def test_the_bits_of_the_ops_one_by_one(which: str, order: str, shared: bool) -> None:
    case = which, order, shared, "torch"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        t = inputs(dtype)
        assert same(everything(together, t, *case), everything(apart, t, *case)), dtype
    t = inputs(torch.float32) | {"y": inputs(torch.bfloat16)["y"]}  # weights are cast, a wide stream has a low product
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = everything(together, t, *case), everything(apart, t, *case)
    assert found[1] is not None and found[1].dtype == torch.bfloat16 and same(found, expected)


def test_it_is_one_node_and_every_gradient_is_asked_for_anew() -> None:
    t = inputs(torch.float32)
    found = together(t, "both", "post", True, "torch")
    node = found[0].grad_fn
    assert node is found[1].grad_fn and type(node).__name__ == "fastmim::branchesBackward"
    assert {type(n).__name__ for n, _ in node.next_functions if n is not None} == {"AccumulateGrad"}
    first, second = (torch.autograd.grad(loss(found), list(t.values()), allow_unused=True, retain_graph=True)
                     for _ in range(2))
    assert same(list(first), list(second))
    (again,) = torch.autograd.grad(loss(found), t["y"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


@pytest.mark.parametrize("which", ["attention", "mlp", "both"])
def test_frozen_inputs_and_recomputation(which: str) -> None:
    t = inputs(torch.float32)
    wanted = everything(apart, t, which, "pre", False, "torch")[2:]
    for frozen in (("x", "y"), ("qkv", "fc1", "weight")):
        for name, tensor in t.items():
            tensor.requires_grad_(name not in frozen)
        found = checkpoint(together, t, which, "pre", False, "torch", use_reentrant=False)
        left = [tensor for name, tensor in t.items() if name not in frozen]
        expected = [grad for name, grad in zip(t, wanted, strict=True) if name not in frozen]
        assert same(list(torch.autograd.grad(loss(found), left, allow_unused=True)), expected)
    with torch.no_grad():
        assert same(list(together(t, which, "pre", False, "torch")), list(apart(t, which, "pre", False, "torch")))


def test_one_result_alone_has_the_same_gradient() -> None:
    t = inputs(torch.float32)
    for which in ("attention", "mlp", "both"):
        for i in (0, 1):
            found, expected = (torch.autograd.grad(run(t, which, "pre", False, "torch")[i].square().sum(), t["y"])
                               for run in (together, apart))
            assert same(list(found), list(expected)), (which, i)


class Nosy(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_who_looks_is_shown_the_ops() -> None:
    class Own(Tensor):
        pass

    t = inputs(torch.float32)
    case = "mlp", "pre", False
    assert together(t, *case, "torch") is not None
    assert together(t, *case, "reference") is None
    assert together(t | {"x": t["x"].detach().as_subclass(Own)}, *case, "torch") is None
    with Nosy():
        assert together(t, *case, "torch") is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert together(t, *case, "torch") is None
    with torch.autocast("cpu", torch.bfloat16):  # the product would have to cast
        assert together(t, *case, "torch") is None
    torch.func.grad(lambda x: x.sum() if together(t | {"x": x}, *case, "torch") is None else 1 / 0)(t["x"])

    seen = []
    torch._dynamo.reset()
    torch.compile(lambda x: seen.append(together(t | {"x": x}, *case, "torch")) or x + 1, backend="eager")(t["x"])
    assert seen == [None]


@pytest.mark.parametrize("name, message", [("qkv", "linear: weight must"), ("bias", "window_attention: bias must"),
                                           ("weight", "residual_norm: weight must"), ("fc2", "mlp: weight2 must")])
def test_wrong_shapes_are_refused_and_autocast_stays(name: str, message: str) -> None:
    t = inputs(torch.bfloat16)
    t[name] = torch.zeros(5, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=message):
            together(t, "mlp" if name == "fc2" else "attention", "post", False, "torch")
        assert torch.is_autocast_enabled("cpu")
