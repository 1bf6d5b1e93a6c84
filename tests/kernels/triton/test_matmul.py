from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastmim_kernels import linear
from fastmim_kernels.common.matmul import precision

SETTINGS = torch.backends.cuda.matmul


@pytest.fixture
def as_before() -> Iterator[None]:
    new = SETTINGS.fp32_precision
    yield
    SETTINGS.fp32_precision = new


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("name, value, wanted", [("allow_tf32", True, "tf32"), ("allow_tf32", False, "ieee"),
                                                 ("fp32_precision", "tf32", "tf32"),
                                                 ("fp32_precision", "ieee", "ieee")])
def test_either_way_to_allow_tf32(name: str, value: bool | str, wanted: str) -> None:
    """torch refuses to read one way's setting after the other's was written; 16-bit products must not ask."""
    setattr(SETTINGS, name, value)
    assert precision(torch.float32) == wanted
    assert precision(torch.bfloat16) == precision(torch.float16) == "ieee"
    x, weight, bias = (torch.ones(size, requires_grad=True) for size in ((4, 8), (16, 8), (16,)))
    linear(x.bfloat16(), weight, bias, impl="triton").sum().backward()
    assert bias.grad is not None and bias.grad.eq(4).all()
