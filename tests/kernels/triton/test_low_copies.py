from __future__ import annotations

import pytest
import torch

from fastmim_kernels.low_copies import on_triton as kernels
from fastmim_kernels.low_copies.op import traffic
from tests.kernels.test_low_copies import check_copies

pytestmark = pytest.mark.usefixtures("poison")


def test_copies_equal_casts() -> None:
    check_copies("triton")


def test_pieces_and_bytes(byte_counter) -> None:  # type: ignore[no-untyped-def]
    """A tensor of more than one piece whose last one is not full, and a small one behind it."""
    given = [torch.randn(kernels.PIECE + 2100), torch.randn(130)]
    flat = torch.empty(kernels.PIECE + 2112 + 192, dtype=torch.bfloat16)
    kernels.copy(given, flat)
    values = sum(t.numel() for t in given)
    assert byte_counter.total <= 1.02 * sum(traffic(values)[:2])
    assert torch.equal(flat[: len(given[0])], given[0].bfloat16())
    assert torch.equal(flat[kernels.PIECE + 2112 :][:130], given[1].bfloat16())


def test_the_table_is_made_once_and_follows_the_addresses() -> None:
    first, second = torch.zeros(64), torch.zeros(64)
    assert kernels.table([first]) is kernels.table([first])
    assert kernels.table([second])[0, 0] == second.data_ptr()
