"""Memory (and what NVML says) over the time of a few steps, sampled from a thread, as JSON and as a picture."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastmim.files import replacing, write_text
from fastmim.wording import install_packages

from .nvml import Nvml

log = logging.getLogger("fastmim")

INTERVAL = 0.005
_COLORS = {"data": "#bab0ac", "forward": "#4e79a7", "backward": "#f28e2b", "update": "#59a14f"}


def used_bytes(device: torch.device) -> int:
    """Allocated by torch on a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # Only the peak so far is known there.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Timeline:
    """Samples while it is entered; :meth:`phase` marks what the step is doing (as the host sees it)."""

    def __init__(self, device: torch.device) -> None:
        self.kind = "cuda allocated" if device.type == "cuda" else "resident (RSS)"
        self.nvml = Nvml(device)
        self.samples: list[dict[str, float]] = []
        self.phases: list[dict[str, Any]] = []
        self._device = device
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Timeline:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            ended = self._end.wait(INTERVAL)
            self._sample()
            if ended:
                return

    def _sample(self) -> None:
        row = {"seconds": self._now(), "bytes": float(used_bytes(self._device)), **self.nvml.sample()}
        self.samples.append(row)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a span, and sample at its end, so that no phase is too short to be seen."""
        start = self._now()
        yield
        self._sample()
        self.phases.append({"name": name, "start": start, "end": self._now()})

    @property
    def peak(self) -> float:
        """Most bytes that a sample saw."""
        return max((row["bytes"] for row in self.samples), default=0.0)

    def averages(self) -> dict[str, float]:
        """Means of what NVML gave; {} without it."""
        keys = [key for key in ("power_w", "utilization", "device_bytes") if self.samples and key in self.samples[0]]
        return {key: sum(row[key] for row in self.samples) / len(self.samples) for key in keys}

    def save(self, folder: Path) -> list[Path]:
        """Write ``memory.json`` and, where matplotlib is installed, ``memory.png``."""
        rows = sorted(self.samples, key=lambda row: row["seconds"])
        nvml = self.nvml.reason or "sampled"
        tree = {"kind": self.kind, "peak_bytes": self.peak, "nvml": nvml, "phases": self.phases}
        path = folder / "memory.json"
        write_text(path, json.dumps(tree | {"samples": rows}, indent=1) + "\n")
        picture = self._draw(rows, folder / "memory.png")
        return [path] if picture is None else [path, picture]

    def _draw(self, rows: list[dict[str, float]], path: Path) -> Path | None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            log.warning("matplotlib is not installed: no memory.png; %s", install_packages("matplotlib"))
            return None
        figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot([row["seconds"] for row in rows], [row["bytes"] / 2**30 for row in rows], color="black", linewidth=1)
        named: set[str] = set()
        for span in self.phases:
            label = None if span["name"] in named else span["name"]
            named.add(span["name"])
            axes.axvspan(span["start"], span["end"], color=_COLORS.get(span["name"], "#eeeeee"), alpha=0.3, label=label)
        axes.set_xlabel("seconds")
        axes.set_ylabel(f"GiB {self.kind}")
        axes.legend(fontsize=8)
        with replacing(path) as partial:
            figure.savefig(partial, format="png")
        return path
