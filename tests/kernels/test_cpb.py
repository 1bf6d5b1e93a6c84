from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import bias_plan, cpb_bias, position_bias
from fastmim_kernels.position_bias.op import OP, traffic
from tests.kernels.oracle import check

NAMES = ["weight1", "bias1", "weight2"]
# (blocks, heads, hidden, window): a square window, a rectangle, one token.
CASES = [(3, 2, 16, (4, 4)), (1, 5, 7, (2, 3)), (2, 1, 4, (1, 1))]


def inputs_for(blocks: int, heads: int, hidden: int, window: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    wh, ww = window
    y, x = torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij")
    y, x = y.reshape(-1), x.reshape(-1)
    index = (y[:, None] - y + wh - 1) * (2 * ww - 1) + x[:, None] - x + ww - 1

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {"coords": normal((2 * wh - 1) * (2 * ww - 1), 2).float(), "index": index,
            "weight1": normal(blocks, hidden, 2), "bias1": normal(blocks, hidden),
            "weight2": normal(blocks, heads, hidden) * 0.3}


def with_impl(impl: str):  # type: ignore[no-untyped-def]
    def run(**kwargs: Any) -> torch.Tensor:
        return cpb_bias(**kwargs | {"coords": kwargs["coords"].to(kwargs["weight1"].dtype)}, impl=impl)
    return run


# (blocks, heads, window) of the stages of an encoder: an odd window, whose bias ends between two alignments.
STAGES = [(2, 1, (4, 4)), (1, 3, (3, 3)), (2, 6, (2, 3))]


def encoder_inputs(hidden: int) -> dict[str, Any]:
    """Parameters of every block by name; hidden 0: tables."""
    stages = [inputs_for(blocks, heads, hidden or 1, window) for blocks, heads, window in STAGES]
    names = ("weight1", "bias1", "weight2") if hidden else ("table",)
    found: dict[str, Any] = {}
    for stage in stages:
        stage["table"] = torch.randn(*stage["weight2"].shape[:2], len(stage["coords"]), dtype=torch.float64).mT
        for i in range(len(stage["weight1"])):
            found |= {f"{len(found)} {name}": stage[name][i] for name in names}
    return found


def encoder_bias(impl: str, hidden: int):  # type: ignore[no-untyped-def]
    stages = [inputs_for(*stage[:2], 1, stage[2]) for stage in STAGES]
    coords = [stage["coords"] for stage in stages] if hidden else None
    plan, blocks = bias_plan([s["index"] for s in stages], [s[0] for s in STAGES], [s[1] for s in STAGES],
                             [len(s["coords"]) for s in stages], coords, hidden)

    def run(**params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(params.values())
        step = 3 if hidden else 1
        own = [tuple(values[i : i + step]) for i in range(0, len(values), step)]
        return tuple(position_bias(plan, blocks, own, impl=impl))
    return run


@pytest.mark.parametrize("hidden", [0, 7])
def test_all_stages_of_an_encoder_at_once(hidden: int) -> None:
    inputs = encoder_inputs(hidden)
    check(encoder_bias("torch", hidden), encoder_bias("reference", hidden), inputs,
          dict.fromkeys(inputs, torch.float32), wrt=list(inputs))


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[Any, ...]) -> None:
    check(with_impl("torch"), with_impl("reference"), inputs_for(*case), dict.fromkeys(NAMES, torch.float32), wrt=NAMES)


def test_any_index_not_only_relative_positions() -> None:
    inputs = inputs_for(*CASES[0])
    inputs["index"] = torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(2))
    check(with_impl("torch"), with_impl("reference"), inputs, dict.fromkeys(NAMES, torch.float32), wrt=NAMES)


def test_stays_in_float32_under_autocast() -> None:
    inputs = inputs_for(*CASES[0])
    inputs |= {n: inputs[n].float() for n in NAMES}
    with torch.autocast("cpu", torch.bfloat16):
        found = cpb_bias(**inputs)
    assert found.dtype == torch.float32 and torch.equal(found, cpb_bias(**inputs))


def op_args(hidden: int, impl: str) -> tuple[Any, ...]:
    """Of the op itself, for one stage of two blocks whose biases leave no gaps, which nobody writes."""
    inputs = inputs_for(2, 2, 5, (2, 4))
    coords = [inputs["coords"]] if hidden else None
    plan, blocks = bias_plan([inputs["index"]], [2], [2], [len(inputs["coords"])], coords, hidden)
    size = blocks[1].params * 2
    layout = [value for block in blocks for value in block]
    return torch.randn(size, requires_grad=True), *plan, layout, hidden, impl


@pytest.mark.parametrize("hidden", [0, 5])
def test_opcheck(hidden: int) -> None:
    torch.library.opcheck(OP.forward.op, op_args(hidden, "torch"))


def test_compiles_without_graph_break() -> None:
    inputs = {name: value.float() for name, value in encoder_inputs(5).items()}
    torch._dynamo.reset()
    run = encoder_bias("torch", 5)
    for ours, theirs in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(**inputs), run(**inputs),
                            strict=True):
        assert torch.equal(ours, theirs)


def test_flops_are_those_of_the_plain_layers() -> None:
    """Counted by torch on the oracle's own products; backward adds one evaluation of the first layer."""
    inputs = inputs_for(*CASES[0])
    inputs |= {n: inputs[n].float().requires_grad_() for n in NAMES}
    counts = {}
    for impl in ("torch", "reference"):
        with FlopCounterMode(display=False) as counter:
            found = cpb_bias(**inputs, impl=impl)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(found.sum(), [inputs[n] for n in NAMES])
        counts[impl] = forward, counter.get_total_flops()
    forward, backward = traffic(3, 2, 49, 256, 16)
    assert counts["torch"] == (forward[2], backward[2])
    assert counts["reference"] == (forward[2], backward[2] - 2 * 3 * 49 * 16 * 2)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="weight1"):
        cpb_bias(**inputs_for(*CASES[0]) | {"bias1": torch.zeros(3, 15)})


def test_a_block_that_nobody_reads_has_gradients_of_zero() -> None:
    """Biases of 9·9 values have gaps behind them, and the gradient of one of them never comes."""
    index = torch.arange(81).view(9, 9) % 25
    plan, blocks = bias_plan([index], [3], [2], [25])
    found = {}
    for impl in ("torch", "reference"):
        tables = [torch.linspace(-1, 1 + i, 50).view(25, 2).requires_grad_() for i in range(3)]
        biases = position_bias(plan, blocks, [(table,) for table in tables], impl=impl)
        (biases[0].square().sum() + biases[2].exp().sum()).backward()
        found[impl] = [table.grad for table in tables]
    assert not any(grads[1] is not None and grads[1].any() for grads in found.values())
    found = {impl: [grads[0], grads[2]] for impl, grads in found.items()}
    torch.testing.assert_close(found["torch"], found["reference"])
