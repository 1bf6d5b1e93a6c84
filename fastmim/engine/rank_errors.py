"""What a rank that fails tells the others, through the store at which they met.

Each rank leaves the text of its error there, rank 0 waits for the others to read it, and a rank whose collective broke
because another one ended takes that one's error for its own.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

# Ranks that fail alike do so within seconds of each other; one that waits in vain for rank 0's error then speaks.
_PATIENCE_SECONDS = 10.0
_told: list[BaseException] = []


class OtherRankError(RuntimeError):
    """Another rank failed, and this one can therefore not go on; the message names that rank and its error."""


def told_by_rank_0(error: BaseException) -> bool:
    """Whether rank 0 says the same: a launcher's output needs it only once."""
    return any(error is one for one in _told)


def share_error(error: Exception, rank: int, size: int) -> None:
    """Tell the others of this rank's error, and leave the group.

    Raises:
        OtherRankError: the error only follows from another rank's.
    """
    store = dist.distributed_c10d._get_default_store()
    follows = isinstance(error, RuntimeError) and not isinstance(error, OtherRankError)
    first = _first_error(store, rank, size) if follows else None
    # A ValueError speaks for itself; of anything else the kind says what happened.
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = f"rank {first[0]}: {first[1]}" if first else f"{kind}{error}"
    try:
        if first is None:
            store.set(f"fastmim error {rank}", text)
        if rank == 0:
            store.set("fastmim error said", text)
        elif first is not None or _get(store, "fastmim error said", _PATIENCE_SECONDS) == text:
            _told.append(error)
        dist.destroy_process_group()  # the others wake up, while rank 0 still holds the store
        store.add("fastmim left", 1)
        if rank == 0:
            _linger(store, size)
    except RuntimeError:
        pass  # rank 0 is gone and its store with it: this rank speaks for itself
    if first is not None:
        failed = OtherRankError(text)
        if rank:
            _told.append(failed)
        raise failed from error
    if follows and _lost(error):
        raise OtherRankError(f"another rank has ended without a word ({' '.join(str(error).split())[:200]})") from error


def _lost(error: Exception) -> bool:
    text = str(error).lower()
    return "closed by peer" in text or "reset by peer" in text or "broken pipe" in text


def _first_error(store: Any, rank: int, size: int) -> tuple[int, str] | None:
    """(rank, text) of an error that another rank has left; it has where a collective of this one broke."""
    until = time.monotonic() + _PATIENCE_SECONDS / 4
    try:
        while time.monotonic() < until:
            for other in range(size):
                if other != rank and store.check([f"fastmim error {other}"]):
                    return other, store.get(f"fastmim error {other}").decode()
            time.sleep(0.1)
    except RuntimeError:
        pass
    return None


def _get(store: Any, key: str, seconds: float) -> str | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if store.check([key]):
            return str(store.get(key).decode())
        time.sleep(0.1)
    return None


def _linger(store: Any, size: int) -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while store.add("fastmim left", 0) < size and time.monotonic() < until:
        time.sleep(0.1)
