from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastmim_kernels.common import arrival


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
