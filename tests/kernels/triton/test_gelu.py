from __future__ import annotations

import pytest
import torch

from fastmim_kernels.mlp import gelu_on_triton as kernels
from fastmim_kernels.mlp.gelu import OP
from fastmim_kernels.mlp.gelu import traffic as closed_form
from tests.kernels.oracle import check
from tests.kernels.test_gelu import SHAPES, inputs_for, plain, with_impl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
# 300 columns: a second, partial block; 105 rows: two programs of unequal work.
@pytest.mark.parametrize("shape", [*SHAPES, (105, 300)])
def test_against_float64(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    inputs, names = inputs_for(shape, bias)
    check(with_impl("triton"), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names, plain=plain)


def test_float16() -> None:
    inputs, names = inputs_for((5, 48), True)
    check(with_impl("triton"), with_impl("reference"), inputs, dict.fromkeys(names, torch.float16), wrt=names,
          plain=plain)


def test_normal_distribution_function_is_exact_to_float32() -> None:
    """The polynomial against erf: an absolute error of a rounding, also far out and at huge values."""
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([1e20, -1e20, 0.0, -0.0])])
    out = kernels.forward(x, None).double()
    truth = torch.nn.functional.gelu(x.double())
    assert ((out - truth).abs() <= 1.5e-7 * x.double().abs().clamp(min=1)).all()


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    inputs, _ = inputs_for((2, 3, 16), bias)
    args = [inputs[n].float().requires_grad_() if n in inputs else None for n in ("x", "bias")]
    torch.library.opcheck(OP.forward.op, (*args, "triton"))


@pytest.mark.parametrize("bias", [False, True])
def test_requested_bytes(bias: bool, byte_counter) -> None:  # type: ignore[no-untyped-def]
    """Two programs read the bias twice: 256 rows make that small, as thousands do in training."""
    x, b = torch.randn(256, 256).bfloat16(), torch.randn(256) if bias else None
    forward, backward = closed_form(256, 256, bias=bias)
    byte_counter.reset()
    kernels.forward(x, b)
    assert byte_counter.total <= 1.02 * sum(forward[:2])
    byte_counter.reset()
    kernels.backward(x, x, b)
    # The second program's partial sums are not in the closed form.
    assert byte_counter.total <= 1.02 * sum(backward[:2]) + 4 * 256 * bias


@pytest.mark.parametrize("columns", [1, 384, 512, 1408, 3072, 16384])
def test_config_covers_the_columns(columns: int) -> None:
    shape = kernels.config(columns)
    assert shape["BLOCK_R"] * shape["BLOCK_N"] == 128 * kernels.ELEMENTS_PER_THREAD
    if columns % 128 == 0:
        assert columns % shape["BLOCK_N"] == 0, "idle lanes"
