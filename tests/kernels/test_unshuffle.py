from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import unshuffle
from fastmim_kernels.unshuffle.op import OP, traffic
from tests.kernels.oracle import check

# (B, K, L, C): 7 of 15 patches in any order; one patch kept, one image; none hidden; none kept.
SHAPES = [(3, 7, 15, 40), (1, 1, 2, 2), (2, 4, 4, 8), (2, 0, 3, 8)]


def inputs_for(shape: tuple[int, int, int, int]) -> tuple[dict, list[str]]:
    b, kept, patches, c = shape
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    places = torch.full((b, patches), -1)
    for row in places:
        row[torch.randperm(patches, generator=generator)[:kept]] = torch.randperm(kept, generator=generator)
    inputs = {"tokens": normal(b, 1 + kept, c), "mask_token": normal(1, 1, c), "pos_embed": normal(1, 1 + patches, c)}
    return inputs | {"places": places}, list(inputs)


def with_impl(impl: str):  # type: ignore[no-untyped-def]
    return lambda **kwargs: unshuffle(**kwargs, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs, names = inputs_for(shape)
    check(with_impl("torch"), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_equals_loops_written_from_the_definition(impl: str) -> None:
    inputs, _ = inputs_for(SHAPES[0])
    out = unshuffle(**inputs, impl=impl)
    for b, row in enumerate(inputs["places"].tolist()):
        for place, number in enumerate([0, *(n + 1 for n in row)]):
            hidden = place > 0 and number == 0
            token = inputs["mask_token"][0, 0] if hidden else inputs["tokens"][b, number]
            assert torch.equal(out[b, place], token + inputs["pos_embed"][0, place])


def test_fixed_positions_get_no_gradient() -> None:
    inputs, names = inputs_for(SHAPES[0])
    args = {k: v.float().requires_grad_(k != "pos_embed") if k in names else v for k, v in inputs.items()}
    unshuffle(**args).sum().backward()
    assert args["pos_embed"].grad is None and args["mask_token"].grad.eq(3 * 8).all()
    assert args["tokens"].grad.eq(1).all()


def test_dtype_of_the_result() -> None:
    tokens, places, token = torch.randn(1, 2, 8).bfloat16(), torch.tensor([[-1, 0]]), torch.zeros(8)
    assert unshuffle(tokens, places, token, torch.zeros(3, 8)).dtype == torch.float32
    assert unshuffle(tokens, places, token, torch.zeros(3, 8), out_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_opcheck_and_compile() -> None:
    inputs, names = inputs_for((2, 2, 5, 8))
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    order = ("tokens", "places", "mask_token", "pos_embed")
    torch.library.opcheck(OP.forward.op, (*(args[n] for n in order), torch.float32, "torch"))
    torch._dynamo.reset()
    compiled = torch.compile(unshuffle, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**args), unshuffle(**args))


def test_counts_no_matrix_product_and_its_bytes() -> None:
    with FlopCounterMode(display=False) as counter:
        unshuffle(**inputs_for(SHAPES[0])[0])
    assert counter.get_total_flops() == 0
    forward, backward = traffic((2, 3, 16), 7)
    assert forward == (2 * 3 * 16 * 2 + 8 * 14 + (8 + 1) * 16 * 4, 16 * 16 * 2, 0)
    assert backward == (16 * 16 * 2 + 8 * 14, 2 * 3 * 16 * 2 + 16 * 4, 0)
