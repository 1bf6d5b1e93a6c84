from __future__ import annotations

import pytest
import torch

from fastmim_kernels import low_copies
from fastmim_kernels.low_copies.op import OP


def parameters() -> list[torch.Tensor]:
    """A matrix, a vector of odd length, one value, and one that is in the dtype already."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(shape, generator=generator) for shape in ((64, 96), (37,), (1,), (5, 3))]
    return [t.requires_grad_() for t in (*found[:3], found[3].bfloat16())]


def check_copies(impl: str) -> None:
    given = parameters()
    for copy, tensor in zip(low_copies(given, torch.bfloat16, impl=impl), given, strict=True):
        assert torch.equal(copy, tensor.detach().bfloat16())
        assert copy is tensor or not copy.requires_grad


def test_copies_equal_casts() -> None:
    check_copies("torch")


def test_opcheck_and_compile() -> None:
    given = [t.detach() for t in parameters()[:3]]
    # Sizes that leave no gaps, which nobody writes.
    torch.library.opcheck(OP.forward.op, ([given[0], torch.ones(64)], torch.bfloat16, "torch"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: low_copies(t, torch.bfloat16), fullgraph=True, backend="aot_eager")
    for copy, tensor in zip(compiled(*given), given, strict=True):
        assert torch.equal(copy, tensor.bfloat16())


def test_a_wrong_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="float16"):
        low_copies([torch.zeros(2, dtype=torch.float16)], torch.bfloat16)
