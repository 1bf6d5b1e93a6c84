"""Every part in a process of its own: one that dies, hangs or poisons CUDA does not take the others with it.

The processes are forked from a server that has imported the libraries and has never touched CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof import store
from benchmarks.proof.part import Outcome, Part, Setting, one_line
from benchmarks.proof.store import Result

TAIL = 15
"""Lines of a failed part's log that are shown at once."""
PATIENCE = 10.0
"""Seconds that a part has to end by itself after it has answered."""


class Worker:
    """Runs parts and keeps their output in ``log`` of the folder, all of it in ``proof.log``."""

    def __init__(self, folder: Path, *, dry: bool, reference: Path | None = None) -> None:
        self.folder, self.dry, self.reference = folder, dry, reference
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "timm", "triton", "fastmim.objectives", "fastmim.engine.local"])
        (folder / "log").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Worker:
        self._log = (self.folder / "proof.log").open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def say(self, line: str) -> None:
        """On the screen and in the log."""
        print(line, flush=True)
        print(line, file=self._log, flush=True)

    def machine(self) -> dict[str, str]:
        """See :func:`benchmarks.proof.store.machine`; a dry run is always on the CPU."""
        state, found = self._call(_machine, (), None)
        if state != "done":
            raise RuntimeError(f"the machine cannot be asked: {found}")
        return found | ({"device": "cpu", "name": ""} if self.dry else {})

    def run(self, part: Part, seconds: float | None) -> Result:
        """Run a part; ``seconds`` is what it has at most (None: no limit)."""
        setting = Setting("cpu" if self.dry else "cuda", self.dry, self.reference)
        path = self.folder / "log" / f"{part.name}.log"
        began = time.monotonic()
        state, answer = self._call(_run_part, (part, setting, str(path)), seconds)
        took = time.monotonic() - began
        output = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self._log.write(output)
        outcome, reason = answer if state == "done" else ({}, answer)
        result = Result(part.name, not reason, reason, took, **outcome)
        lines = output.splitlines()
        for line in lines if self.dry else lines[-TAIL:] if not result.passed else []:
            print(f"   {line}", flush=True)
        return result

    def _call(self, function: Any, args: tuple[Any, ...], seconds: float | None) -> tuple[str, Any]:
        """("done", answer), or ("ended", why)."""
        here, there = self._context.Pipe(duplex=False)
        # Nothing is ever sent: its end, when this process ends in whatever way, is the message.
        lives, own = self._context.Pipe(duplex=False)
        patience = 0.0
        process = self._context.Process(target=_serve, args=(there, lives, function, args))
        process.start()
        there.close()
        lives.close()
        try:
            if not here.poll(seconds):
                return "ended", f"took longer than the {seconds:.0f} s that were left; run it alone with --parts"
            patience = PATIENCE
            return "done", here.recv()
        except EOFError:
            process.join(PATIENCE)
            return "ended", f"its process ended with exit status {process.exitcode}"
        finally:
            _end(process, patience)
            own.close()


def _end(process: Any, patience: float) -> None:
    """The process, and what it has started: it leads a group of its own."""
    process.join(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _serve(connection: Connection, lives: Connection, function: Any, args: tuple[Any, ...]) -> None:
    os.setsid()
    threading.Thread(target=_end_with, args=(lives,), daemon=True).start()
    connection.send(function(*args))
    connection.close()


def _end_with(command: Connection) -> None:
    """End with the command, and what was started with it: a part that outlives it would keep the GPU busy beside the
    next one's measurements, and no signal to the command's group reaches it."""
    with contextlib.suppress(EOFError, OSError):
        command.recv()
    os.killpg(os.getpid(), signal.SIGKILL)


def _machine() -> dict[str, str]:
    return store.machine()


def _run_part(part: Part, setting: Setting, log: str) -> tuple[dict[str, Any], str]:
    """Outcome and failure of a part whose output goes into its log; what it found before it raised is kept."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    if setting.dry:  # the shapes are too small for threads
        torch.set_num_threads(1)
    outcome, raised = Outcome(), ""
    try:
        part.function()(setting, outcome)
    except Exception as error:  # a broken compiler or driver shows in many types, and the other parts go on
        traceback.print_exc()
        raised = one_line(error)
    return dataclasses.asdict(outcome), raised or outcome.failure()
