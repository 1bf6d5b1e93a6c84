from __future__ import annotations

import pytest
import torch

from fastmim_kernels.mlp.op import OP
from tests.kernels.oracle import check
from tests.kernels.test_mlp import BF16, F32, NAMES, inputs_for, plain, with_impl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("x, parameters", [(F32, F32), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("recompute_fc1", [False, True])
@pytest.mark.parametrize("biases", ["12", "1", ""])
def test_against_float64(biases: str, recompute_fc1: bool, x: torch.dtype, parameters: torch.dtype) -> None:
    # 3x13 rows make two programs of unequal work; 24 → 40 → 16: no two widths equal.
    inputs, names = inputs_for((3, 13, 24), 40, 16, biases)
    check(with_impl("triton", recompute_fc1), with_impl("reference"), inputs,
          dict.fromkeys(names, parameters) | {"x": x}, wrt=names, plain=plain)


def test_opcheck() -> None:
    inputs, _ = inputs_for((2, 3, 16), 24, 8)
    args = [inputs[n].float().requires_grad_() for n in NAMES]
    torch.library.opcheck(OP.forward.op, (*args, None, None, False, "triton"))
