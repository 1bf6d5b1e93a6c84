"""The one way to make an op, shown on a toy: scale·x·W, whose input has a second reader."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastmim_kernels
from fastmim_kernels.common import direct
from fastmim_kernels.common.define_op import PASSES, Kept, define_op

KERNELS = Path(fastmim_kernels.__file__).parent


def toy_forward(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if scale < 0:
        raise RuntimeError("broken")
    product = x @ weight
    return product * scale, product


def toy_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: float, add: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = grad @ weight.mT * scale
    return dx if add is None else dx + add, x.mT @ grad * scale


def toy_fake(x: Tensor, weight: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], weight.shape[1])


def toy_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, scale: float, impl: str, add: Tensor | None
                      ) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def toy_save(inputs: Any, outputs: Any) -> Any:
    x, weight, scale, impl = inputs
    return (x, weight), (scale, impl)


def toy_gradients(backward: Callable, kept: Kept, grad: Tensor | None, add: Tensor | None = None
                  ) -> tuple[Tensor | None, ...]:
    return (add,) if grad is None else backward(grad, *kept.tensors, *kept.settings, add)


def toy_flops(x: Any, weight: Any, *_: Any) -> int:
    return 2 * x[0] * x[1] * weight[1]


TOY = define_op(
    "toy_of_a_test", SimpleNamespace(forward=toy_forward, backward=toy_backward),
    reference=lambda x, weight, scale: x @ weight * scale, fake=toy_fake, backward_fake=toy_backward_fake,
    save=toy_save, gradients=toy_gradients, readers=lambda inputs, outputs: (outputs[0], inputs[0]), flops=toy_flops,
    backward_flops=lambda grad, x, weight, *_: 2 * toy_flops(x, weight),
    moved=lambda args, share: (round(args[0].numel() * share), args[1].numel()))


class Watcher(TorchDispatchMode):
    """Does nothing but to see which ops of ours pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastmim":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(5, 3, generator=generator, dtype=dtype).requires_grad_(),
            torch.randn(3, 4, generator=generator, dtype=dtype).requires_grad_())


def everything() -> list[Tensor]:
    """Results and gradients of the op alone, and of the op with a second reader of its input."""
    x, weight = inputs()
    alone = TOY(x, weight, 2.0, impl="torch")
    out, stream = TOY.hand_on(x, weight, 2.0, impl="torch")
    loss = alone.square().sum() + out.square().sum() + stream.pow(3).sum()
    return [alone.detach(), out.detach(), stream.detach(), *torch.autograd.grad(loss, (x, weight))]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients_by_finite_differences(impl: str) -> None:
    x, weight = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: TOY(x, w, 1.5, impl=impl), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: TOY.hand_on(x, w, 1.5, impl=impl), (x, weight))
    # What is read a second time leaves through the same gradient.
    assert torch.autograd.gradcheck(lambda x, w: sum(t.square().sum() for t in TOY.hand_on(x, w, 1.5, impl=impl)),
                                    (x, weight))


def test_both_ways_to_the_same_function_give_the_same_bits() -> None:
    plain = everything()
    with Watcher() as watcher:
        watched = everything()
    assert watcher.seen == ["toy_of_a_test.default"] * 2 + ["toy_of_a_test_backward.default"] * 2
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_the_direct_way_passes_by_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the dispatcher was asked")

    monkeypatch.setattr(TOY.forward, "op", refuse)
    monkeypatch.setattr(TOY.backward, "op", refuse)
    everything()


class OnGpu:
    """What the direct way asks of a CUDA tensor."""

    is_cuda, is_cpu, dtype = True, False, torch.float32

    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index


def test_the_direct_way_is_for_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kernel would be given an address of another device's memory; the dispatcher's way refuses in words."""
    cpu, meta = torch.ones(1), torch.ones(1, device="meta")
    assert direct.plain((cpu, None, [cpu, cpu])) is not None
    assert [direct.plain(args) for args in ((cpu, meta), (meta, cpu), ([cpu], meta), ([cpu, meta],))] == [None] * 4
    monkeypatch.setattr(direct, "Tensor", OnGpu)
    here, same, there = OnGpu(0), OnGpu(0), OnGpu(1)
    assert direct.plain((here, same, [same])).like is here
    mixed = ((here, there), (here, [there]), ([here], there), ([here, there],))
    assert [direct.plain(args) for args in mixed] == [None] * 4


@pytest.mark.parametrize("hand_on", [False, True])
def test_either_result_alone(hand_on: bool) -> None:
    x, weight = inputs()
    found = TOY.hand_on(x, weight, 2.0, impl="torch") if hand_on else (TOY(x, weight, 2.0, impl="torch"), x)
    dx, dw = torch.autograd.grad(found[0].sum(), (x, weight), retain_graph=True)
    torch.testing.assert_close((dx, dw), torch.autograd.grad(2 * (x @ weight).sum(), (x, weight)))
    only, none = torch.autograd.grad(found[1].sum(), (x, weight), allow_unused=True)
    assert torch.equal(only, torch.ones_like(x)) and none is None


def test_the_second_result_is_the_input_by_another_name() -> None:
    x, weight = inputs()
    out, stream = TOY.hand_on(x, weight, 2.0, impl="torch")
    assert stream.data_ptr() == x.data_ptr() and stream.grad_fn is out.grad_fn
    assert type(out.grad_fn).__name__ == "fastmim::toy_of_a_testBackward", "what a profiler shows"


def test_saved_tensors_are_what_the_declaration_says() -> None:
    """Nothing else is packed, and each is unpacked once: checkpointing gives a tensor out a single time."""
    packed, unpacked = [], []
    x, weight = inputs()
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.data_ptr()) or t, lambda t: unpacked.append(t.data_ptr()) or t):
        TOY.hand_on(x, weight, 2.0, impl="torch")[0].sum().backward()
    assert packed == unpacked == [x.data_ptr(), weight.data_ptr()]
    found = checkpoint(lambda x, w: TOY(x, w, 2.0, impl="torch"), x, weight, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], x.grad)


def test_fakes_opcheck_and_flops() -> None:
    x, weight = inputs()
    torch.library.opcheck(TOY.forward.op, (x, weight, 2.0, "torch"))
    torch.library.opcheck(TOY.backward.op, (torch.ones(5, 4), x.detach(), weight.detach(), 2.0, "torch", None))
    with FakeTensorMode():
        assert TOY(torch.empty(7, 3), torch.empty(3, 2), 2.0, impl="torch").shape == (7, 2)
    with FlopCounterMode(display=False) as counter:
        TOY(x, weight, 2.0, impl="torch").sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 5 * 3 * 4)


def test_compiles_without_a_graph_break() -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        out, stream = TOY.hand_on(x, weight, 2.0, impl="auto")
        return out.sum() + stream.square().sum() + TOY(x, weight, 0.5, impl="auto").square().sum()

    x, weight = inputs()
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(found, run(x, weight))
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, weight)) for loss in (found, run(x, weight))))


def test_both_passes_run_outside_autocast() -> None:
    """The op keeps the dtype of its inputs, also where backward is called inside autocast."""
    x, weight = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = TOY(x, weight, 2.0, impl="torch")
        (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == dx.dtype == torch.float32 and torch.equal(out, 2 * (x @ weight))
    assert torch.equal(dx, torch.ones(5, 4) @ weight.mT * 2)


def test_an_exception_leaves_nothing_behind() -> None:
    x, weight = inputs()
    before = everything()
    with torch.autocast("cpu", torch.bfloat16):
        for watched in (False, True):
            with pytest.raises(RuntimeError, match="broken"), Watcher() if watched else torch.enable_grad():
                TOY(x, weight, -1.0, impl="torch")
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_an_implementation_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="^toy_of_a_test: impl=.* must be one of auto, torch, reference; there is"):
        TOY(*inputs(), 2.0, impl="triton")
    with pytest.raises(ValueError, match="must be 'auto' or 'torch' for float64"):
        fastmim_kernels.gelu(torch.zeros(2, dtype=torch.float64), impl="triton")


def test_formulas_are_found_by_name() -> None:
    forward = PASSES["fastmim::toy_of_a_test"]
    assert forward is TOY.forward and forward.moved is not None
    assert forward.moved((torch.empty(10), torch.empty(4)), 0.5) == (5, 4)
    assert PASSES["fastmim::toy_of_a_test_backward"].of == "toy_of_a_test"
    assert PASSES["fastmim::toy_of_a_test_backward"].moved is None


SCAFFOLDING = {"library", "custom_op", "triton_op", "register_fake", "register_autograd", "register_flop_formula",
               "Function", "once_differentiable"}


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        name.rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (*(alias.name for alias in node.names), getattr(node, "module", None) or "")}


def test_no_other_file_makes_an_op() -> None:
    makers = {str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.py") if names_in(path) & SCAFFOLDING}
    assert makers == {"common/define_op.py"}


# From the ground up: who stands further right may import who stands further left. `nn` and `fusion` are on the ops.
def test_no_triton_without_need() -> None:
    """The Triton half of a room is loaded by the first launch, not with the package, nor by what torch does."""
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import torch, fastmim_kernels as fk; fk.gelu(torch.zeros(2)); "
            "sys.exit(any('triton' in m for m in sys.modules if m.startswith('fastmim_kernels')))")
    assert subprocess.run([sys.executable, "-c", code, str(KERNELS.parent)], check=False).returncode == 0


def test_what_is_kept_of_an_inference_does_not_reach_a_training_step() -> None:
    linear = torch.nn.Linear(3, 5)
    for training in (False, True):
        with torch.inference_mode(not training):
            # float16: nothing before has asked for an empty tensor of it
            x = torch.ones(2, 3, dtype=torch.float16, requires_grad=training)
            found = fastmim_kernels.linear(x, linear.weight, low_weight=linear.weight.detach().half(), impl="torch")
    found.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0].float(), linear.weight.sum(0), rtol=1e-2, atol=1e-3)


def test_an_empty_result_of_a_mode_stays_in_it() -> None:
    from fastmim_kernels.common.rows import nothing
    plain = torch.ones(1)
    with FakeTensorMode() as mode:
        fake = nothing(mode.from_tensor(plain))
    assert type(fake) is not Tensor and type(nothing(plain)) is Tensor and nothing(plain) is nothing(plain)


def test_double_backward_is_refused() -> None:
    x, weight = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    gradient, = torch.autograd.grad(TOY(x, weight, 2.0, impl="torch").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_who_must_look_into_the_op_is_sent_to_the_oracle() -> None:
    x, weight = torch.randn(3, 2), torch.randn(2, 4)

    def loss(x: Tensor, impl: str) -> Tensor:
        return TOY(x, weight, 2.0, impl=impl).sum()

    found = torch.func.grad(lambda x: loss(x, "reference"))(x)
    assert torch.allclose(found, 2 * weight.sum(1).expand(3, 2))
    with pytest.raises(RuntimeError, match="toy_of_a_test: torch.func.*impl='reference'"):
        torch.func.grad(lambda x: loss(x, "torch"))(x)
    traced = torch.jit.trace(lambda x: loss(x, "reference"), x)
    assert torch.allclose(traced(2 * x), loss(2 * x, "reference"))
    with pytest.raises(RuntimeError, match="toy_of_a_test: torch.jit.trace.*impl='reference'"):
        torch.jit.trace(lambda x: loss(x, "torch"), x)


def test_parameters_that_are_spread_are_refused() -> None:
    class Spread(Tensor):
        placements = ()

    spread = torch.Tensor._make_subclass(Spread, torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="fully_shard\\(\\) the model as a whole"):
        TOY(torch.ones(3, 2), spread, 2.0, impl="torch")
