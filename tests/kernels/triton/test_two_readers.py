from __future__ import annotations

import pytest

from tests.kernels.test_two_readers import BF16, F32, OPS, check_both, torch

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("x", [F32, BF16])
@pytest.mark.parametrize("name", OPS)
def test_against_float64(name: str, x: torch.dtype) -> None:
    check_both(name, "triton", x)
