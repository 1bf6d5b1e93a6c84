"""SIGTERM and SIGINT: finish the step, and stop at the same step on every rank."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("fastmim")


class StopRequest:
    """While active, a first SIGTERM or SIGINT only raises a flag; a second one acts as if this were not here.

    ``agreed()`` is called once per step on every rank. With several ranks the flags are combined by an
    all-reduce on the CPU that is started at one step and read at the next, so that nobody waits for it and
    all ranks leave after the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}
        self._flag = torch.zeros((), dtype=torch.int32)
        self._pending: Any = None
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        # NCCL would put the flag on the GPU's queue; the agreement must not wait for the GPU.
        needs_group = self._several and dist.get_backend() != "gloo"
        self._group: Any = dist.new_group(backend="gloo") if needs_group else None

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere the caller keeps the handling.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()
        if self._pending is not None and exc[0] is None:
            self._pending.wait()
        self._pending = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker: Ctrl-C reaches the whole group
        self.requested = True
        self._restore()
        log.warning("%s: finishing this step, then saving", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def agreed(self) -> bool:
        """True on every rank at the same call, once any rank was asked to stop."""
        if not self._several:
            return self.requested
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag)
        self._flag.fill_(int(self.requested or stop))
        self._pending = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return stop
