"""Signals that mean "stop soon": finish the step, and stop at the same step on every rank."""

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
    """While active, a first signal only raises a flag; a second SIGTERM or SIGINT acts as if this were not here.

    SIGUSR1, SIGUSR2 (schedulers, ahead of the end of a job) and SIGHUP (a closed terminal) ask for the same and never
    end the process, however often they come. A SIGHUP that is ignored, as nohup does, stays so.

    ``agreed()`` is called once per step on every rank. With several ranks the flags are combined by an
    all-reduce on the CPU that is started at one step and read at the next, so that nobody waits for it and
    all ranks leave after the same step.
    """

    FORCING = (signal.SIGTERM, signal.SIGINT)
    SIGNALS = (*FORCING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

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
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
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
        if self.requested:
            return
        self.requested = True
        self._restore(self.FORCING)
        log.warning("%s: finishing this step, then saving", signal.Signals(number).name)

    def _restore(self, numbers: tuple[signal.Signals, ...] = SIGNALS) -> None:
        for number in numbers:
            if number in self._previous:
                handler = self._previous.pop(number)
                # None: the handler was not installed from Python and cannot be put back from here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
