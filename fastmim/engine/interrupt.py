"""Signals that mean "stop soon": stop between two micro-batches, the same two on every rank."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("fastmim")

ABORTED = 130
"""Exit status after a second signal, as shells have it for SIGINT."""
_SAME_REQUEST = 1.0  # seconds: launchers pass on a signal of the terminal that has reached the ranks already
_UNWINDING = 2.0  # seconds that an abort may take before the process is ended from outside


class StopRequest:
    """While active, a first signal only raises a flag; a second SIGTERM or SIGINT acts as if this were not here.

    SIGUSR1, SIGUSR2 (schedulers, ahead of the end of a job) and SIGHUP (a closed terminal) ask for the same and never
    end the process, however often they come. A SIGHUP that is ignored, as nohup does, stays so.

    Signals are answered by a thread, at once: Python's own handlers wait until a call into C comes back, and one such
    call is a whole backward pass.

    Args:
        ends_process: a second SIGTERM or SIGINT ends the process with status :data:`ABORTED`, whatever it does. One
            that follows the first within a second is the same request, passed on by a launcher.

    Attributes:
        number: the signal that has asked for the stop; 0: none has. Others may set it.
    """

    FORCING = (signal.SIGTERM, signal.SIGINT)
    SIGNALS = (*FORCING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    def __init__(self, *, ends_process: bool = False) -> None:
        self.number = 0
        self._asked_at = 0.0
        self._ends_process, self._aborting = ends_process, False
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._watcher: threading.Thread | None = None
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._pending: Any = None
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        # NCCL would put the flags on the GPU's queue; the agreement must not wait for the GPU.
        needs_group = self._several and dist.get_backend() != "gloo"
        self._group: Any = dist.new_group(backend="gloo") if needs_group else None

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.number != 0

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere the caller keeps the handling.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._on_signal)
            self._start_watcher()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._aborting:  # else the watcher sees to it that the rest of the way out does not hang
            self._closed.set()
            self._stop_watcher()
        self._restore()
        if self._pending is not None and exc[0] is None:
            self._pending.wait()
        self._pending = None

    def agreed(self, also: bool = False) -> tuple[int, bool]:
        """Whether to stop, and whether any rank has said ``also``: the same on every rank at the same call.

        With several ranks these are the flags of the call before: they are combined by an all-reduce on the CPU that
        is started at one call and read at the next, so that nobody waits for it.

        Returns:
            (the signal of a rank that was asked to stop, or 0; ``also``)
        """
        if not self._several:
            return self.number, also
        number, other = 0, False
        if self._pending is not None:
            self._pending.wait()
            number, other = int(self._flags[0]), bool(self._flags[1])
        self._flags[0], self._flags[1] = max(self.number, number), int(also)
        self._pending = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return number, other

    def _start_watcher(self) -> None:
        reader, writer = self._pipe = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if before != -1:  # somebody else's, an event loop's: the handlers must do
            signal.set_wakeup_fd(before)
            self._close_pipe()
            return
        _watched.add(self._pid)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), name="fastmim-signals", daemon=True)
        self._watcher.start()

    def _stop_watcher(self) -> None:
        if self._watcher is None or self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        _watched.discard(self._pid)
        os.write(self._pipe[1], b"\0")
        self._watcher.join()
        self._watcher = None
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _watch(self, reader: int) -> None:
        while not self._closed.is_set():
            for number in os.read(reader, 64):
                if number in self.SIGNALS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        """A signal has come."""
        if not self.number:
            self._asked_at = time.monotonic()
            self.number = number
            more = "" if number not in self.FORCING else "; once more aborts without saving"
            log.warning("%s: stopping after this micro-batch and saving%s", number.name, more)
            return
        again = number in self.FORCING and time.monotonic() - self._asked_at >= _SAME_REQUEST
        if self._ends_process and again and not self._aborting:
            self._abort(number)

    def _abort(self, number: signal.Signals) -> None:
        self._aborting = True
        log.error("%s again: aborting, nothing is saved; the last checkpoint is as it was", number.name)
        _thread.interrupt_main()
        if threading.current_thread() is threading.main_thread():
            return
        if not self._closed.wait(_UNWINDING):
            with suppress(OSError, ValueError, AttributeError):
                if sys.__stdout__ is not None and sys.__stdout__.isatty():
                    os.write(sys.__stdout__.fileno(), b"\x1b[?25h\n")  # the live line has hidden the cursor
            os._exit(ABORTED)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker: Ctrl-C reaches the whole group
        if self._aborting:
            raise KeyboardInterrupt
        if self._watcher is None:
            self._note(signal.Signals(number))
        if not self._ends_process:
            self._restore(self.FORCING)

    def _restore(self, numbers: tuple[signal.Signals, ...] = SIGNALS) -> None:
        for number in numbers:
            if number in self._previous:
                handler = self._previous.pop(number)
                # None: the handler was not installed from Python and cannot be put back from here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


_watched: set[int] = set()


def _forget_in_child() -> None:
    # A signal that reaches a forked process must not be counted as one of ours.
    if os.getppid() in _watched:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
