"""Births, deaths and peaks of storages, on sequences short enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastmim.plan.counter import DispatchCounter
from fastmim.plan.live import LiveBytes
from fastmim_kernels.common.dispatch import as_on_a_gpu, no_triton, resolve


def test_a_storage_lives_until_its_last_tensor_dies() -> None:
    live = LiveBytes()
    with DispatchCounter(live=live):
        a = torch.empty(10)  # tick 0: 40 bytes
        view = a.view(2, 5)  # 1: the same storage
        del a
        b = view + 1  # 2: 40 more
        del view
        c = b * 2  # 3: the first one is gone
    assert live.history()[0] == [40, 40, 80, 80] and live.now == 80
    del b
    assert live.now == 40 and live.peak() == 80 and c.numel() == 10


def test_known_tensors_do_not_count_and_chosen_ones_count_apart() -> None:
    weight = torch.ones(4, requires_grad=True)
    live = LiveBytes([weight])
    with FakeTensorMode(allow_non_fake_inputs=True), DispatchCounter(live=live):
        kept = torch.empty(6)
        grad = torch.empty(4)
    others, grads = live.history([grad])
    assert (others, grads) == ([24, 24], [0, 16]) and kept.numel() == 6


def test_a_transient_counts_at_its_tick_only() -> None:
    live, made = LiveBytes(), torch.empty(2)
    assert live.tick([made], transient=100) == 8 and live.tick([made]) == 0
    assert live.history()[0] == [108, 8]


def test_the_switch_for_fake_tensors() -> None:
    """Triton is chosen inside it only, and not by a FakeTensorMode alone, under which torch.compile traces a CPU."""
    pytest.importorskip("triton")
    cpu, implementations = torch.device("cpu"), {"torch": len, "triton": max}
    with FakeTensorMode():
        assert no_triton(cpu) and resolve("op", "auto", implementations, cpu) is len
        with as_on_a_gpu():
            assert not no_triton(cpu) and resolve("op", "auto", implementations, cpu) is max
        assert no_triton(cpu)
