from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmim_kernels.cpb import _op
from fastmim_kernels.triton import cpb as kernels
from tests.kernels.oracle import check
from tests.kernels.test_cpb import CASES, NAMES, inputs_for, with_impl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[Any, ...]) -> None:
    check(with_impl("triton"), with_impl("reference"), inputs_for(*case), dict.fromkeys(NAMES, torch.float32),
          wrt=NAMES)


def test_rows_that_no_pair_uses_have_gradient_zero() -> None:
    table, index = torch.full((1, 2, 6), 0.5), torch.tensor([[1, 1], [4, 1]])
    grad = kernels.scatter(torch.ones(1, 2, 2, 2), index, table)
    assert torch.equal(grad[0, 0], torch.tensor([0.0, 12.0, 0.0, 0.0, 4.0, 0.0]))


def test_an_index_that_changes_is_sorted_again() -> None:
    index = torch.tensor([[0, 1]])
    table, grad = torch.full((1, 1, 2), 0.5), torch.tensor([[[[1.0, 2.0]]]])
    assert kernels.scatter(grad, index, table).flatten().tolist() == [4.0, 8.0]
    index.copy_(torch.tensor([[1, 1]]))
    assert kernels.scatter(grad, index, table).flatten().tolist() == [0.0, 12.0]


def test_opcheck() -> None:
    inputs = inputs_for(*CASES[1])
    inputs |= {n: inputs[n].float().requires_grad_() for n in NAMES}
    torch.library.opcheck(_op, (*inputs.values(), "triton"))
