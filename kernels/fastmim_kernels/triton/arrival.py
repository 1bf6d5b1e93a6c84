"""Sum of the partial results of a launch inside that launch: the programs that arrive last add them up.

Who arrives last is decided by an integer counter; what is added, and in which order, is not: the rows of a group
in the order of their programs, then the groups in theirs. So a repeated launch gives the same bits, and the
reduction costs no launch of its own. Two levels, because a single program would read hundreds of rows alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 16
"""Programs whose rows are added first."""
MOST_PROGRAMS = 1 << 14

_counters: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def sum_partials(
    p_partial,  # (programs, WIDTH) float32, one row stored by each program before the call; overwritten
    p_counter,  # (1 + ⌈programs / GROUP⌉,) int32, zero before and after the launch
    p_out,  # (WIDTH,) float32, out: the sum of the rows
    i_program, programs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr,
):
    """Every program of the launch calls this once, as the last thing it does."""
    i_group = i_program // GROUP
    members = tl.minimum(programs - i_group * GROUP, GROUP)
    groups = (programs + GROUP - 1) // GROUP
    p_rows = p_partial + (i_group * GROUP).to(tl.int64) * WIDTH
    # The row is stored by all threads, and only then one of them counts it.
    tl.debug_barrier()
    if tl.atomic_add(p_counter + 1 + i_group, 1, sem="acq_rel") == members - 1:
        tl.store(p_counter + 1 + i_group, 0)
        _sum_rows(p_rows, p_rows, members, WIDTH, WIDTH, GROUP)
        tl.debug_barrier()
        if tl.atomic_add(p_counter, 1, sem="acq_rel") == groups - 1:
            tl.store(p_counter, 0)
            _sum_rows(p_partial, p_out, groups, GROUP * WIDTH, WIDTH, GROUP)


@triton.jit
def _sum_rows(p_rows, p_out, rows, stride, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    o_r = tl.arange(0, GROUP)
    o_c = tl.arange(0, 256)
    for i_c in range(0, WIDTH, 256):
        m_c = i_c + o_c < WIDTH
        acc = tl.zeros((256,), tl.float32)
        for i_r in range(0, rows, GROUP):
            p_tile = p_rows + (i_r + o_r).to(tl.int64)[:, None] * stride + (i_c + o_c)[None, :]
            m_tile = (i_r + o_r < rows)[:, None] & m_c[None, :]
            # Other processors wrote these: past the cache of this one.
            acc += tl.sum(tl.load(p_tile, mask=m_tile, other=0, cache_modifier=".cg"), 0)
        tl.store(p_out + i_c + o_c, acc, mask=m_c)


def counters(device: torch.device) -> Tensor:
    """The int32 counters of a device and stream, all zero: a launch leaves them as it found them."""
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _counters:
        _counters[key] = torch.zeros(1 + MOST_PROGRAMS // GROUP, dtype=torch.int32, device=device)
    return _counters[key]
