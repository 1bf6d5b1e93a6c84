"""visible_attention on the kernels of window attention: accuracy of output and gradients, in the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch

from fastmim_kernels.visible_attention.op import visible_attention
from tests.kernels import oracle
from tests.kernels.test_visible_attention import make


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("padded and shifted", torch.float32),
        ("one token in many windows", torch.float32),
        ("every place is taken", torch.bfloat16),
    ],
)
def test_accuracy(name, dtype, poison):
    """Its queries are rounded once more than those of the torch implementation."""
    given, rest = make(name)
    dtypes = {key: dtype if key == "qkv" else torch.float32 for key in given}
    op, truth = (functools.partial(visible_attention, impl=impl) for impl in ("triton", "reference"))
    floor = 4e-6 if dtype == torch.float32 else oracle.FLOOR
    oracle.check(op, truth, {**given, **rest}, dtypes, list(given), floor=floor)
