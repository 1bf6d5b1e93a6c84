from __future__ import annotations

import pytest
import torch

from fastmim_kernels.residual_norm import on_triton as kernels
from fastmim_kernels.residual_norm.op import OP
from fastmim_kernels.residual_norm.op import traffic as closed_form
from tests.kernels.oracle import check
from tests.kernels.test_residual_norm import (
    BF16,
    F32,
    STREAMS,
    VARIANTS,
    check_merge,
    check_without,
    dtypes_for,
    inputs_for,
    op_args,
    plain,
    with_impl,
)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("stream, branch", STREAMS)
@pytest.mark.parametrize("order, given", VARIANTS)
def test_against_float64(order: str, given: str, stream: torch.dtype, branch: torch.dtype) -> None:
    # 105 rows fill no tile and make two programs of unequal work, 40 channels pad to 64.
    inputs = inputs_for((3, 5, 7, 40), given)
    dtypes = dtypes_for(inputs, stream, branch)
    check(with_impl("triton", order, branch), with_impl("reference", order, branch), inputs, dtypes,
          wrt=list(dtypes), plain=plain(order, branch))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["residual", "branch"])
def test_without_a_residual_or_a_branch(name: str, dtype: torch.dtype) -> None:
    check_without(name, "triton", dtype)


@pytest.mark.parametrize("stream", [F32, BF16])
@pytest.mark.parametrize("given", ["", "scale+branch_bias"])
def test_merge(given: str, stream: torch.dtype) -> None:
    check_merge(given, "triton", stream)


# 1: one channel pads to 16; 352: SwinV2-H pads to 512; 1100: a row is wider than a warp's registers.
@pytest.mark.parametrize("channels", [1, 352, 1100])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_widths(order: str, channels: int) -> None:
    inputs = inputs_for((2, 3, channels), "scale+branch_bias")
    if channels == 1:  # its LayerNorm has zero variance and a zero gradient that is all rounding
        inputs["branch"] = inputs["branch"] * 0
        wrt = ["residual", "bias"]
    else:
        wrt = [n for n in inputs if n != "drop_scale"]
    dtypes = dtypes_for(inputs, F32, F32)
    check(with_impl("triton", order, F32), with_impl("reference", order, F32), inputs, dtypes, wrt=wrt)


def test_float16() -> None:
    inputs = inputs_for((2, 9, 48), "scale+gamma+branch_bias")
    dtypes = dtypes_for(inputs, torch.float16, torch.float16)
    check(with_impl("triton", "pre", torch.float16), with_impl("reference", "pre", torch.float16), inputs, dtypes,
          wrt=list(dtypes), plain=plain("pre", torch.float16))


def test_one_result_alone() -> None:
    from tests.kernels.test_residual_norm import test_one_result_alone as one_result
    for order in ("pre", "post"):
        for used in (0, 1):
            one_result(order, "triton", used)


@pytest.mark.parametrize("order, given", [("pre", ""), ("post", "scale+branch_bias")])
def test_opcheck(order: str, given: str) -> None:
    args = op_args(inputs_for((2, 3, 16), given), order, BF16, "triton")
    torch.library.opcheck(OP.forward.op, args,
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("stream", [F32, BF16])
@pytest.mark.parametrize("order, given", VARIANTS)
def test_requested_bytes(order: str, given: str, stream: torch.dtype, byte_counter) -> None:  # type: ignore[no-untyped-def]
    """Two programs read the (C,) vectors twice: 300 rows make that small, as thousands do in training."""
    inputs = {k: v.float() for k, v in inputs_for((3, 100, 64), given).items()}
    named = {n: n in inputs for n in ("drop_scale", "gamma", "branch_bias")}
    forward, backward = closed_form(300, 64, order, itemsize=stream.itemsize, **named)
    vectors = [inputs.get(n) for n in ("weight", "bias", "branch_bias", "drop_scale", "gamma")]
    residual, branch = inputs["residual"].to(stream), inputs["branch"].bfloat16()
    byte_counter.reset()
    added, out, mean, rstd = kernels.forward(residual, branch, *vectors, order, 1e-5, stream, BF16, False)
    assert byte_counter.total <= 1.02 * sum(forward[:2])
    byte_counter.reset()
    saved = branch if order == "post" else added
    weight, _, branch_bias, scale, gamma = vectors
    kernels.backward(added, out if out.numel() else None, saved, branch if gamma is not None else None, mean, rstd,
                     weight, branch_bias, scale, gamma, order, False, stream, BF16)
    # Two rows of partial sums, which two programs write and the last one adds up, are not in the closed form.
    sums = 2 + (gamma is not None) + (branch_bias is not None)
    assert byte_counter.total <= 1.02 * sum(backward[:2]) + 6 * sums * 64 * 4 + 16


@pytest.mark.parametrize("channels", [1, 96, 128, 352, 768, 1024, 2816, 4096])
def test_config_covers_the_row(channels: int) -> None:
    shape = kernels.config(channels)
    assert shape["BLOCK_C"] >= channels and 4 <= shape["num_warps"] <= 16
    # One 128-bit access of bf16 a thread and tensor.
    assert shape["BLOCK_R"] * shape["BLOCK_C"] == 32 * shape["num_warps"] * kernels.ELEMENTS_PER_THREAD
