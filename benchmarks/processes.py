"""Each provider of a benchmark in a process of its own.

In one process the providers would share an allocator and its settings, and the peak of memory would be the
largest one's. Here each keeps to itself, and is idle while another is timed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Remote:
    """``build(*args)`` in a new process, whose methods :meth:`call` runs there.

    Args:
        build: A function or class at the top level of a module.
        args: Its arguments, small and picklable.
    """

    def __init__(self, build: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, build, args), daemon=True)
        self._process.start()
        there.close()

    def call(self, method: str) -> Any:
        """What the method returns.

        Raises:
            RuntimeError: it raised, or the process ended; names the cause.
        """
        try:
            self._connection.send(method)
            worked, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{method}: the provider's process ended ({error or 'no answer'})") from error
        if not worked:
            raise RuntimeError(f"{method}: {value}")
        return value

    def close(self) -> None:
        """End the process and free its memory."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, build: Callable[..., Any], args: tuple[Any, ...]) -> None:
    provider: Any = None
    while True:
        try:
            method = connection.recv()
        except (EOFError, OSError):
            return
        try:
            provider = build(*args) if provider is None else provider
            answer = True, getattr(provider, method)()
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)
