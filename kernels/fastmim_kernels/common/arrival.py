"""The last program to arrive finishes what all have begun: sums over programs in a fixed order, in one launch.

Each program writes its partial sum and adds one to a counter; who finds all others counted reads the partial
sums, in the order of their places and not of their arrival. Only whole numbers are added atomically, so a
repeated run gives the same bits.

**No state survives a launch that failed.** Counters are zero when a launch begins, and the last program to arrive
at one puts it back to zero. All who count on a counter of :func:`counters` belong to *one* launch, and a launch runs
as a whole or not at all: what the host may raise (out of memory, Ctrl-C, arguments that Triton refuses) comes before
it is in the stream or after, and a fault on the device ends the context with all memory in it. Between two launches
of a stream, whoever makes them and from whichever thread, the counters are therefore zero; two streams have each
their own. An op whose count goes over several launches must own its counters: they are made for one forward, zeroed
by one of its own launches, and what a failure leaves in them goes with them.

**CUDA graphs** keep addresses, and replay them on any stream beside launches that are not theirs. During a capture
every launch gets zeroed memory of the graph's own pool, which nobody else uses; what is kept here is in no graph, so
that it may be replaced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .caches import of_others

GROUP = 16
"""Programs whose partial sums are added first: a single program would read those of hundreds alone."""
_AT_LEAST = 16384
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """(≥ count,) int32 zeros for one launch, which :func:`arrive` leaves behind as zeros.

    ``device`` is current. The memory is that of all launches of the current stream, but for CUDA graphs and what a
    compiler may make one of, and in the interpreter, where a launch can fail halfway.
    """
    if device.type != "cuda" or of_others() or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    found = _counters.get(key)
    if found is None or found.numel() < count:
        found = _counters[key] = torch.zeros(max(count, _AT_LEAST), dtype=torch.int32, device=device)
    return found


@triton.jit
def arrive(p_count, expected):
    """Whether this is the last of ``expected`` programs to come here, their stores being visible if so."""
    # All threads' stores first; the release of the one thread that counts then covers them.
    tl.debug_barrier()
    before = tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu")
    last = before == expected - 1
    if last:
        tl.store(p_count, 0)
    return last


@triton.jit
def sum_partials(
    p_partial,  # (programs, WIDTH) float32, one row stored by each program before the call; overwritten
    p_counter,  # (1 + ⌈programs / GROUP⌉,) int32, see counters()
    p_out,  # (WIDTH,) float32, out: the sum of the rows
    i_program, programs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr,
):
    """Every program of a launch calls this once, at its end: the rows of a group are added, then the groups."""
    i_group = i_program // GROUP
    members = tl.minimum(programs - i_group * GROUP, GROUP)
    groups = (programs + GROUP - 1) // GROUP
    if arrive(p_counter + 1 + i_group, members):
        p_rows = p_partial + (i_group * GROUP).to(tl.int64) * WIDTH
        _sum_rows(p_rows, p_rows, members, WIDTH, WIDTH, GROUP)
        if arrive(p_counter, groups):
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
