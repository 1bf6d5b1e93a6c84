"""A branch and its norm as one node runs the kernels of the ops one by one."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_branches import apart, everything, inputs, same, together


@pytest.mark.parametrize("which, order, shared", [("both", "post", True), ("mlp", "pre", False)])
def test_the_bits_of_the_ops_one_by_one(which: str, order: str, shared: bool) -> None:
    t, case = inputs(torch.float32), (which, order, shared, "triton")
    found = everything(together, t, *case)
    assert same(found, everything(apart, t, *case))
    for ours, theirs in zip(found, everything(apart, t, which, order, shared, "torch"), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
