from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import cpb_bias
from fastmim_kernels.cpb import _op, traffic
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


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[Any, ...]) -> None:
    check(with_impl("torch"), with_impl("reference"), inputs_for(*case), dict.fromkeys(NAMES, torch.float32), wrt=NAMES)


def test_any_index_not_only_relative_positions() -> None:
    inputs = inputs_for(*CASES[0])
    inputs["index"] = torch.randint(0, 9, (5, 3), generator=torch.Generator().manual_seed(2))
    check(with_impl("torch"), with_impl("reference"), inputs, dict.fromkeys(NAMES, torch.float32), wrt=NAMES)


def test_stays_in_float32_under_autocast() -> None:
    inputs = inputs_for(*CASES[0])
    inputs |= {n: inputs[n].float() for n in NAMES}
    with torch.autocast("cpu", torch.bfloat16):
        found = cpb_bias(**inputs)
    assert found.dtype == torch.float32 and torch.equal(found, cpb_bias(**inputs))


def test_opcheck_and_compile() -> None:
    inputs = inputs_for(*CASES[1])
    inputs |= {n: inputs[n].float().requires_grad_() for n in NAMES}
    torch.library.opcheck(_op, (*inputs.values(), "torch"))
    torch._dynamo.reset()
    compiled = torch.compile(cpb_bias, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), cpb_bias(**inputs))


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
