from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmim_kernels.position_bias import on_triton as kernels
from fastmim_kernels.position_bias.op import OP, Block
from tests.kernels.oracle import check
from tests.kernels.test_cpb import CASES, NAMES, encoder_bias, encoder_inputs, inputs_for, op_args, with_impl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[Any, ...]) -> None:
    check(with_impl("triton"), with_impl("reference"), inputs_for(*case), dict.fromkeys(NAMES, torch.float32),
          wrt=NAMES)


# 40 hidden values: two and a half tiles.
@pytest.mark.parametrize("hidden", [0, 40])
def test_all_stages_of_an_encoder_at_once(hidden: int) -> None:
    inputs = encoder_inputs(hidden)
    check(encoder_bias("triton", hidden), encoder_bias("reference", hidden), inputs,
          dict.fromkeys(inputs, torch.float32), wrt=list(inputs))


def test_rows_that_no_pair_uses_have_gradient_zero() -> None:
    block = Block(heads=1, rows=6, pairs=4, params=0, coords=0, pair=0, start=0, table=0, bias=0)
    order, start = torch.tensor([0, 1, 3, 2]), torch.tensor([0, 0, 3, 3, 3, 4, 4])
    grad = kernels.backward(torch.ones(4), torch.empty(0), torch.zeros(6), torch.empty(0), order, start,
                            torch.empty(0, 2), torch.tensor([block]), list(block), 0)
    assert torch.equal(grad, torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("hidden", [0, 5])
def test_opcheck(hidden: int) -> None:
    torch.library.opcheck(OP.forward.op, op_args(hidden, "triton"))
