from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import mask_tokens
from fastmim_kernels.mask_tokens.op import OP, traffic
from tests.kernels.oracle import check, watched

# 5x3 is neither square nor a power of two, 40 channels pad to 64; one token of 2 channels is the smallest that has
# a norm.
SHAPES = [(3, 5, 3, 40), (1, 1, 1, 2)]
VARIANTS = ["plain", "norm", "pos", "norm+pos"]


def inputs_for(shape: tuple[int, ...], variant: str) -> tuple[dict, list[str]]:
    generator = torch.Generator().manual_seed(7)
    c = shape[-1]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = {"tokens": normal(*shape), "mask_token": normal(1, 1, c)}
    if "norm" in variant:
        inputs |= {"norm_weight": normal(c), "norm_bias": normal(c)}
    if "pos" in variant:
        inputs["pos_embed"] = normal(1, *shape[1:3], c)
    mask = torch.rand(shape[:3], generator=generator) < 0.6
    return inputs | {"mask": mask}, list(inputs)


def with_impl(impl: str):  # type: ignore[no-untyped-def]
    return lambda **kwargs: mask_tokens(**kwargs, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], variant: str, dtype: torch.dtype) -> None:
    inputs, names = inputs_for(shape, variant)
    check(with_impl("torch"), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_op_against_float64(dtype: torch.dtype) -> None:
    """Without norm and position a CPU takes a shorter way where nobody watches."""
    inputs, names = inputs_for(SHAPES[0], "plain")
    check(watched(with_impl("torch")), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names)


@pytest.mark.parametrize("mask_value", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32])
def test_all_or_nothing_hidden_and_mask_dtypes(mask_value: bool, mask_dtype: torch.dtype) -> None:
    inputs, names = inputs_for((2, 3, 3, 8), "norm+pos")
    inputs["mask"] = torch.full((2, 3, 3), mask_value).to(mask_dtype)
    check(with_impl("torch"), with_impl("reference"), inputs, dict.fromkeys(names, torch.float32), wrt=names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_gradient_is_exactly_zero(variant: str) -> None:
    """Also where the hidden token is infinite: what nobody sees cannot spoil a gradient."""
    inputs, names = inputs_for((2, 4, 4, 16), variant)
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    with torch.no_grad():
        args["tokens"][args["mask"]] = float("inf")
    (grad,) = torch.autograd.grad(mask_tokens(**args, impl="torch").sum(), args["tokens"])
    assert grad[args["mask"]].eq(0).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_infinite_gradient_stays_with_its_token(variant: str) -> None:
    inputs, names = inputs_for((2, 4, 4, 16), variant)
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    hidden, seen = args["mask"].nonzero()[0], args["mask"].logical_not().nonzero()[0]
    for where, others in ((hidden, "tokens"), (seen, "mask_token")):
        cotangent = torch.ones(2, 4, 4, 16)
        cotangent[tuple(where)] = float("inf")
        (grad,) = torch.autograd.grad(mask_tokens(**args, impl="torch"), args[others], cotangent)
        assert torch.isfinite(grad).all()


def test_dtype_of_the_result() -> None:
    tokens, mask, token = torch.randn(1, 2, 2, 8).bfloat16(), torch.ones(1, 2, 2).bool(), torch.zeros(8)
    norm = {"norm_weight": torch.ones(8), "norm_bias": torch.zeros(8)}
    assert mask_tokens(tokens, mask, token).dtype == torch.bfloat16
    assert mask_tokens(tokens, mask, token, **norm).dtype == torch.bfloat16
    assert mask_tokens(tokens, mask, token, pos_embed=torch.zeros(2, 2, 8)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert mask_tokens(tokens, mask, token, **norm).dtype == torch.float32
        assert mask_tokens(tokens, mask, token, **norm, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str) -> None:
    inputs, names = inputs_for((2, 3, 2, 8), variant)
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    torch.library.opcheck(OP.forward.op, (args["tokens"], args["mask"], args["mask_token"], args.get("norm_weight"),
                                args.get("norm_bias"), args.get("pos_embed"), 1e-5, torch.float32, "torch"))


def test_compiles_without_graph_break() -> None:
    inputs, names = inputs_for((2, 3, 2, 8), "norm+pos")
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    torch._dynamo.reset()
    compiled = torch.compile(mask_tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**args), mask_tokens(**args))


def test_counts_no_matrix_product() -> None:
    inputs, _ = inputs_for((2, 3, 2, 8), "norm")
    with FlopCounterMode(display=False) as counter:
        mask_tokens(**inputs).sum()
    assert counter.get_total_flops() == 0


def test_traffic_leaves_hidden_tokens_out() -> None:
    forward, backward = traffic((2, 4, 4, 16), visible=0.5, itemsize=2, out_itemsize=4, param_itemsize=4)
    assert forward == (16 * 16 * 2 + 32 + 64, 32 * 16 * 4, 0)
    assert backward == (32 * 16 * 4 + 32, 32 * 16 * 2 + 64, 0)


@pytest.mark.parametrize("change, word", [
    ({"mask": torch.ones(1, 3, 2)}, "mask"), ({"mask_token": torch.zeros(5)}, "mask_token"),
    ({"norm_weight": torch.ones(4)}, "norm_bias"), ({"pos_embed": torch.zeros(3)}, "pos_embed")])
def test_wrong_shapes_are_named(change: dict, word: str) -> None:
    args = {"tokens": torch.zeros(1, 2, 2, 4), "mask": torch.ones(1, 2, 2), "mask_token": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=word):
        mask_tokens(**args)
