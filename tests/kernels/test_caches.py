"""What is kept between calls must have its values whenever it is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmim_kernels.common.caches import MOST, keep_tensors


def test_what_is_made_in_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    @keep_tensors
    def ones(count: int) -> Tensor:
        return torch.ones(count)

    before, capturing = ones(2), [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert ones(2) is before, "what has its values already serves a graph too"
    inside = ones(3)
    capturing[0] = False
    after = ones(3)
    assert inside is not after and ones(3) is after


def test_the_oldest_goes_first() -> None:
    made: list[int] = []

    @keep_tensors
    def note(i: int) -> int:
        made.append(i)
        return i

    for i in range(MOST + 1):
        note(i)
    note(1)
    note(0)
    assert made == [*range(MOST + 1), 0]
