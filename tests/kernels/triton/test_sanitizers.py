"""Every op under other orders of programs and with guards around its memory, and that both would see a fault."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastmim_kernels.linear import weight_gradient
from fastmim_kernels.window_attention import triton_rows_launch
from tests.kernels.triton.examples import EXAMPLES, Example, run
from tests.kernels.triton.sanitizers import guard, visit

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of small examples are split, too, into groups of parts, and the windows into groups."""
    monkeypatch.setattr(triton_rows_launch, "window_groups", lambda windows, *args: min(windows, 2))
    monkeypatch.setattr(weight_gradient, "programs_at_once", lambda device: 40)
    monkeypatch.setattr(weight_gradient, "PART", 1)


@pytest.mark.usefixtures("shared_counters")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_same_bits_in_any_order_and_nothing_outside(example: Example) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ran = guard(patch)
        first = run(example, "triton")
    assert ran
    for order in ("reversed", "random"):
        with pytest.MonkeyPatch.context() as patch:
            visit(patch, order)
            again = run(example, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), order


@triton.jit
def shift_kernel(p_x, p_out, n, BY: tl.constexpr, LESS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o + BY, mask=o < n - LESS, other=0), mask=o < n)


@triton.jit
def running_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_out + o) * 2 + tl.load(p_x + tl.program_id(0) * BLOCK + o))


# One value too far, one too early, and no fault.
@pytest.mark.parametrize("by, less, fault", [(1, 0, "reads outside"), (-1, 0, "reads outside"), (1, 1, "")])
def test_guards_see_a_read(by: int, less: int, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.arange(100.0)[::2][:40].contiguous(), torch.zeros(40)
    guard(monkeypatch)
    if fault:
        with pytest.raises(InterpreterError, match=fault):
            shift_kernel[(3,)](x, out, 40, BY=by, LESS=less, BLOCK=16)
    else:
        shift_kernel[(3,)](x, out, 40, BY=by, LESS=less, BLOCK=16)
        assert torch.equal(out[:39], x[1:]) and out[39] == 0


def test_guards_see_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    guard(monkeypatch)
    with pytest.raises(InterpreterError, match="writes outside"):
        shift_kernel[(3,)](torch.zeros(48), torch.zeros(47), 48, BY=0, LESS=0, BLOCK=16)


def test_guards_know_views_of_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of one tensor are one block; a column of a matrix is read at its own values only."""
    guard(monkeypatch)
    both = torch.arange(64.0)
    shift_kernel[(2,)](both[:32], both[32:], 32, BY=0, LESS=0, BLOCK=16)
    assert torch.equal(both[32:], both[:32])
    out = torch.zeros(16)
    shift_kernel[(1,)](torch.arange(48.0).view(16, 3)[:, 0], out, 16, BY=0, LESS=0, BLOCK=16)
    assert out[0] == 0 and out[1].isnan(), "what lies between the values of a column is not shown"


@pytest.mark.parametrize("order", ["reversed", "random"])
def test_orders_are_visited(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = torch.randn(5 * 16), []
    for _ in range(2):
        out = torch.zeros(16)
        running_kernel[(5,)](x, out, BLOCK=16)
        found.append(out)
        visit(monkeypatch, order)
    assert not torch.equal(*found)
    if order == "reversed":
        torch.testing.assert_close(found[1], sum(x.view(5, 16)[i] * 2.0**i for i in range(5)))
