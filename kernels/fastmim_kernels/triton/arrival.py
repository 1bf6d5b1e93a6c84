"""The last program to arrive finishes what all have begun: sums over programs in a fixed order, in one launch.

Each program writes its partial sum and adds one to a counter; who finds all others counted reads the partial
sums, in the order of their places and not of their arrival. Only whole numbers are added atomically, so a
repeated run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_LEAST = 16384
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """(≥ count,) int32 zeros, the same memory for every launch of a stream: :func:`arrive` leaves zeros behind."""
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
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
