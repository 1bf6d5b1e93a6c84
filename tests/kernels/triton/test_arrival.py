from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode

from fastmim_kernels.common import arrival
from fastmim_kernels.common.define_op import PASSES
from fastmim_kernels.masked_loss import linear_on_triton
from tests.kernels.triton.examples import EXAMPLES, Example, hidden, normal, run


@triton.jit
def constant_rows(p_in, p_partial, p_counter, p_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    o = tl.arange(0, BLOCK)
    i = tl.program_id(0)
    tl.store(p_partial + i * WIDTH + o, tl.load(p_in + i * WIDTH + o, mask=o < WIDTH, other=0), mask=o < WIDTH)
    arrival.sum_partials(p_partial, p_counter, p_out, i, tl.num_programs(0), WIDTH, GROUP)


# One program; one full group; a group more with one program; more groups than are added at a time.
@pytest.mark.parametrize("programs", [1, 16, 17, 16 * 16 + 3])
def test_sum_of_all_programs(programs: int) -> None:
    width = 300  # more than one tile of columns
    rows, found = torch.randn(programs, width), []
    for _ in range(2):
        out = torch.full((width,), float("nan"))
        counter = arrival.counters(1 + programs, rows.device)
        constant_rows[(programs,)](rows, torch.full_like(rows, float("nan")), counter, out, width, 512, arrival.GROUP)
        assert not counter.any(), "the counters must be zero for the next launch"
        found.append(out)
    assert torch.equal(*found)
    torch.testing.assert_close(out.double(), rows.double().sum(0), rtol=1e-5, atol=1e-5)


class Launches:
    """Counts launches; the one of number ``fails`` raises before anything of it has happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.fails = 0, -1
        launch = interpreter.GridExecutor.__call__

        def counted(executor: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
            self.count += 1
            if self.count - 1 == self.fails:
                raise torch.OutOfMemoryError("simulated")
            launch(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def of(self, example: Example) -> int:
        self.count, self.fails = 0, -1
        run(example, "triton")
        return self.count


def chunked() -> Example:
    """A head and its loss in two chunks of at most 64 tokens."""
    inputs = {"tokens": normal(12, 2, 3, 8), "weight": normal(64, 8), "bias": normal(64),
              "target": normal(12, 1, 16, 24), "mask": hidden(12, 4, 6), "stride": 8}
    return Example("linear_masked_l1", "two chunks", lambda: inputs, ("tokens", "weight", "bias"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_state_survives_a_failure_between_launches(monkeypatch: pytest.MonkeyPatch, shared_counters: Tensor) -> None:
    """Any launch of any op may not come: afterwards the counters are zero and every op gives the same bits."""
    monkeypatch.setattr(linear_on_triton, "SLOPE_BYTES", 64 * 64 * 4)
    examples = [chunked(), *(e for e in EXAMPLES if e.op != "window_attention" or "81 tokens" in e.name)]
    before = {e.name: run(e, "triton") for e in examples}
    with pytest.MonkeyPatch.context() as patch:
        launches = Launches(patch)
        counts = {e.name: launches.of(e) for e in examples}
        assert counts["linear_masked_l1: two chunks"] == 8, "order, three for each chunk, backward"
        for example in examples:
            for number in range(1, counts[example.name]):
                launches.count, launches.fails = 0, number
                with pytest.raises(torch.OutOfMemoryError):
                    run(example, "triton")
                assert not shared_counters.any(), f"{example.name}, before launch {number}"
    for example in examples:
        assert all(map(torch.equal, before[example.name], run(example, "triton"))), example.name


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU by name: which stream is current, and whether it is captured."""
    state = SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(arrival, "_counters", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_each_stream_has_counters_of_its_own(gpu: SimpleNamespace) -> None:
    device = torch.device("cuda:0")
    with FakeTensorMode():
        first = arrival.counters(5, device)
        assert arrival.counters(7, device) is first
        gpu.cuda_stream = 2
        assert arrival.counters(5, device) is not first
        assert arrival.counters(5, torch.device("cuda:1")).device.index == 1
        gpu.cuda_stream = 1
        assert arrival.counters(5, device) is first
        more = arrival.counters(first.numel() + 1, device)
        assert more.numel() > first.numel() and arrival.counters(5, device) is more


def test_a_cuda_graph_shares_its_counters_with_nobody(gpu: SimpleNamespace) -> None:
    """Neither with launches before and after the capture, on the same stream, nor with another graph."""
    device = torch.device("cuda:0")
    with FakeTensorMode():
        before = arrival.counters(5, device)
        gpu.capturing = True
        graph, other = arrival.counters(5, device), arrival.counters(5, device)
        gpu.capturing = False
        assert len({id(t) for t in (before, graph, other)}) == 3
        assert arrival.counters(5, device) is before


def test_nothing_stays_in_the_memory_of_a_compilers_graphs(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:  # fmt: skip
    """Inductor runs an op as torch knows it in the pool of its graphs before it captures anything."""
    device, found = torch.device("cuda:0"), []

    def counting(*args: Any) -> Tensor:
        found.append(arrival.counters(5, device))
        return args[0].clone()

    op = PASSES["fastmim::gelu"]
    monkeypatch.setitem(op.functions, "torch", counting)
    with FakeTensorMode():
        kept = arrival.counters(5, device)
        for _ in range(2):
            OPDEFS["fastmim::gelu"]._init_fn(torch.empty(2, 3), None, "torch")
        op.run(torch.empty(2, 3), None, "torch")
        assert found[0] is not kept and found[1] is not found[0] and found[2] is kept
