"""Worker processes that make items out of requests, in order: what stands between a data set and its loader.

An item travels in a file in memory that trainer and worker hold open from the start: no shared memory by name, so
``/dev/shm`` may be of any size, and no new file handle an item. The pipe beside it carries a few bytes. A worker does
all its work in one thread, so whatever fails there is answered; a worker that is gone is noticed at once. One that a
native library has killed is replaced, and the file that it had in hand is reported.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch

from fastmim.data import notes
from fastmim.data.memory_file import memory_file, pack, unpack, write
from fastmim.data.worker_error import DataWorkerError, WaitInterrupted, cannot_start, why_dead, with_fix

_LOG = logging.getLogger("fastmim")
_TICK = 0.5  # seconds between looks at whether the run is to stop
_PARENT_TICK = 5.0  # seconds after which an idle worker looks for its trainer
_GRACE = 2.0  # seconds until the end of a killed worker is known
_PATIENCE = 5.0  # seconds that an item may still take once the run is to stop
_SLOW = 60.0  # seconds of waiting after which the file in hand is named
_MOST_CRASHES = 16  # workers lost to crashes with no item between them
#: What a native library's own fault looks like. Any other signal comes from outside, and no file is to blame.
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS})
#: They reach the whole process group. The trainer answers them by saving; workers end with the trainer.
_UNHEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WorkerDataset(Protocol):
    """What a worker makes items with. ``holding`` is called with each file before its bytes reach a decoder."""

    known_bad: frozenset[int]
    holding: Callable[[int], None]

    def __getitem__(self, request: Any, /) -> Any: ...


def nothing_held(_: int) -> None:
    """``holding`` where nobody looks."""


class _Worker(NamedTuple):
    process: Any
    asks: Connection
    answers: Connection


class WorkerPool:
    """Items of ``dataset``, in the order of their requests, made ahead by worker processes.

    Args:
        dataset: forked into every worker.
        num_workers: at least 1.
        ahead: requests under way per worker.
        label: the printable name of a file.
        crashed: called with (file, reason) for a file whose decoder killed its worker.

    Attributes:
        stop: looked at while waiting: once it is true, an item that does not come raises :class:`WaitInterrupted`.
    """

    def __init__(
        self,
        dataset: WorkerDataset,
        num_workers: int,
        *,
        ahead: int,
        label: Callable[[int], str],
        crashed: Callable[[int, str], None],
    ) -> None:
        self.stop: Callable[[], bool] = lambda: False
        self._dataset, self._count, self._ahead = dataset, num_workers, ahead
        self._label, self._crashed = label, crashed
        # A forked worker has the data set without copying it; on no account may it touch the GPU.
        self._context = multiprocessing.get_context("fork")
        self._held = mmap.mmap(-1, 8 * num_workers)
        self._waiting: list[deque[Any]] = [deque() for _ in range(num_workers)]
        self._slots: list[list[int]] = []
        self._workers: list[_Worker] = []
        # Also when the pool is given up without close(): its processes and handles are not garbage of Python's.
        self._end = weakref.finalize(self, _end, self._workers, self._slots, os.getpid())
        self._quarantined: frozenset[int] = frozenset()
        self._crashes = 0
        try:
            for _ in range(num_workers):
                self._slots.append([])
                for _ in range(ahead):
                    self._slots[-1].append(memory_file())
            for number in range(num_workers):
                self._workers.append(self._start(number))
        except OSError as err:
            self.close()
            raise DataWorkerError(cannot_start(err, num_workers)) from None

    def items(self, requests: Iterator[Any], *, pin_memory: bool = False) -> Iterator[Any]:
        """The items of ``requests``, one by one. A new call forgets what an earlier one has not taken.

        Raises:
            DataWorkerError: a worker failed, or was killed from outside.
            WaitInterrupted: ``stop`` is true, and the next item does not come.
        """
        self._drain()
        sent, taken, ended = 0, 0, False
        while True:
            while not ended and sent - taken < self._count * self._ahead:
                try:
                    request = next(requests)
                except StopIteration:
                    ended = True
                    break
                self._send(sent % self._count, (sent // self._count) % self._ahead, request)
                sent += 1
            if sent == taken:
                return
            slot = (taken // self._count) % self._ahead
            item = self._take(taken % self._count, slot, pin_memory)
            taken += 1
            yield item

    @property
    def under_way(self) -> int:
        """Requests that are not taken yet."""
        return sum(map(len, self._waiting))

    def close(self) -> None:
        """End the workers, whatever they do. Safe to call twice."""
        self._end()

    def _start(self, number: int) -> _Worker:
        asked, asks = self._context.Pipe(duplex=False)
        answers, answered = self._context.Pipe(duplex=False)
        struct.pack_into("q", self._held, 8 * number, -1)
        arguments = (self._dataset, asked, answered, self._slots[number], self._held, number, os.getpid())
        process = self._context.Process(target=_serve, args=arguments, daemon=True, name=f"fastmim-data-{number}")
        # One that comes before the worker has put it off would end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEEDED)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        asked.close()
        answered.close()
        return _Worker(process, asks, answers)

    def _send(self, number: int, slot: int, request: Any) -> None:
        self._waiting[number].append((slot, request))
        self._ask(number, slot, request)

    def _ask(self, number: int, slot: int, request: Any) -> None:
        data = pickle.dumps((request, self._quarantined))
        try:
            write(self._slots[number][slot], [data])
            self._workers[number].asks.send_bytes(struct.pack("qq", slot, len(data)))
        except (BrokenPipeError, ConnectionError):
            pass  # it is gone: found, with the reason, when its answer is due
        except OSError as err:
            raise DataWorkerError(f"cannot hand work to a data worker: {err.strerror or err}") from None

    def _take(self, number: int, slot: int, pin_memory: bool) -> Any:
        while True:
            answer = self._wait(number)
            if answer is not None:
                break
            self._replace(number)
        self._waiting[number].popleft()
        self._crashes = 0
        size = struct.unpack("q", answer)[0]
        kind, value = unpack(self._slots[number][slot], size, pin_memory)
        if kind == "error":
            raise DataWorkerError(f"a data worker failed: {value}")
        return value

    def _wait(self, number: int) -> bytes | None:
        """The worker's next answer; None when it has died without one."""
        worker, began, told = self._workers[number], time.monotonic(), False
        while True:
            ready = wait([worker.answers, worker.process.sentinel], _TICK)
            if worker.answers in ready:
                try:
                    return worker.answers.recv_bytes()
                except (EOFError, ConnectionError):
                    worker.process.join(_GRACE)
                    return None
            if ready:
                return None
            waited = time.monotonic() - began
            if waited > _PATIENCE and self.stop():
                raise WaitInterrupted(f"asked to stop, and no data has come for {waited:.0f} s")
            if not told and waited > _SLOW:
                told = True
                file = self._in_hand(number) or "no file"
                _LOG.warning("waiting for data for %.0f s; being read: %s", _SLOW, file, extra={"repeats": True})

    def _in_hand(self, number: int) -> str:
        file = struct.unpack_from("q", self._held, 8 * number)[0]
        return self._label(file) if file >= 0 else ""

    def _replace(self, number: int) -> None:
        """Start another worker for one that has crashed, with the same work but for the file that it had in hand.

        Raises:
            DataWorkerError: it died of something else, or too many crash.
        """
        worker = self._workers[number]
        worker.process.join(_GRACE)
        code, file = worker.process.exitcode, struct.unpack_from("q", self._held, 8 * number)[0]
        worker.asks.close()
        worker.answers.close()
        self._crashes += 1
        if code is None or -code not in _CRASHES or self._crashes > _MOST_CRASHES:
            raise DataWorkerError(why_dead(code, worker.process.pid, self._in_hand(number)))
        name = signal.Signals(-code).name
        if file >= 0:
            self._quarantined |= {file}
            self._dataset.known_bad |= {file}
            self._crashed(file, f"its decoder crashed ({name})")
        else:
            _LOG.warning("a data worker (pid %d) crashed (%s) with no file in hand: replaced", worker.process.pid, name)
        try:
            self._workers[number] = self._start(number)
        except OSError as err:
            raise DataWorkerError(cannot_start(err, self._count)) from None
        for slot, request in self._waiting[number]:
            self._ask(number, slot, request)

    def _drain(self) -> None:
        """Take the answers that nobody waits for any more."""
        for number, waiting in enumerate(self._waiting):
            while waiting:
                self._take(number, waiting[0][0], False)


def _end(workers: list[_Worker], slots: list[list[int]], owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of the pool
        return
    for worker in workers:
        worker.process.kill()  # they hold nothing that could be lost
    for worker in workers:
        worker.process.join(_GRACE)
        worker.asks.close()
        worker.answers.close()
    for slot in itertools.chain.from_iterable(slots):
        os.close(slot)


def _serve(
    dataset: WorkerDataset, asked: Connection, answered: Connection, slots: list[int], held: mmap.mmap, number: int,
    trainer: int,
) -> None:  # fmt: skip
    """The life of a worker: answer requests until the trainer is gone."""
    for signal_number in _UNHEEDED:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _UNHEEDED)
    torch.set_num_threads(1)
    notes.only_decoders_here()
    dataset.holding = lambda file: struct.pack_into("q", held, 8 * number, file)
    while True:
        try:
            while not asked.poll(_PARENT_TICK):
                if os.getppid() != trainer:
                    return
            slot, size = struct.unpack("qq", asked.recv_bytes())
            answer = _answer(dataset, os.pread(slots[slot], size, 0))
            dataset.holding(-1)
            try:
                length = pack(slots[slot], answer)
            except OSError as err:
                length = pack(slots[slot], ("error", with_fix(err)))
            answered.send_bytes(struct.pack("q", length))
        except (EOFError, BrokenPipeError, ConnectionError):
            return


def _answer(dataset: WorkerDataset, request: bytes) -> tuple[str, Any]:
    try:
        item, quarantined = pickle.loads(request)
        if not quarantined <= dataset.known_bad:
            dataset.known_bad |= quarantined
        return "item", dataset[item]
    except OSError as err:
        return "error", with_fix(err)
    except MemoryError:
        return "error", "memory is full; use fewer data.num_workers or a smaller train.micro_batch_size"
    except Exception as err:
        _LOG.debug("in a data worker", exc_info=True)
        return "error", f"{type(err).__name__}: {' '.join(str(err).split())}"
