from __future__ import annotations

from types import SimpleNamespace

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


def test_a_cuda_graph_keeps_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot make one, as it may not wait for the host, and holds the address of the one that is there."""
    state = SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(kernels, "_tables", {})
    monkeypatch.setattr(kernels, "_of_graphs", {})

    def place(address: int) -> SimpleNamespace:
        """A tensor of 64 values there; its table stays on the CPU."""
        return SimpleNamespace(data_ptr=lambda: address, numel=lambda: 64, device=torch.device("cuda:0"))

    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    warm = kernels.table([place(16)])
    state.cuda_stream, state.capturing = 2, True
    assert kernels.table([place(16)]) is warm
    with pytest.raises(RuntimeError, match="run the step once"):
        kernels.table([place(32)])
    state.capturing = False
    for i in range(3, 20):
        kernels.table([place(16 * i)])
    assert len(kernels._tables) <= 8
    state.capturing = True
    assert kernels.table([place(16)]) is warm, "evicted, but a graph reads it"
