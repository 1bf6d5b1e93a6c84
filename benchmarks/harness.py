"""Interleaved timing of several providers of the same work, and one CSV schema for the results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import command

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    "benchmark", "case", "dtype", "batch", "img_size", "ranks", "device", "provider", "baseline", "seconds",
    "seconds_p20", "seconds_p80", "images_per_sec", "images_per_sec_p20", "images_per_sec_p80", "ratio", "ratio_p20",
    "ratio_p80", "rounds", "loss", "data_s", "forward_s", "backward_s", "optimizer_s", "wall_s", "peak_memory_gib",
    "memory_kind", "start_memory_gib", "nvml_memory_gib", "saved_mb_per_image", "launches", "mb_per_image",
    "gflop_per_image", "modelled_us_per_image", "roofline_share", "matmul_share", "mfu", "joules_per_image",
    "peak_rss_gib", "note", "load_average", "machine", "threads", "python", "torch", "triton", "timm", "reference",
    "commit", "date",
)  # fmt: skip


class LossesDiffer(ValueError):
    """Providers that do not compute the same loss are not compared."""


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one provider."""

    seconds: tuple[float, ...]

    def quantiles(self) -> tuple[float, float, float]:
        """Median, 20 % and 80 % quantile."""
        return quantiles(self.seconds)


def quantiles(values: tuple[float, ...] | list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile (the value itself where there is only one)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), cuts[0], cuts[-1]


def _wall(_: str) -> float:
    return time.perf_counter()


def interleave(
    steps: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1, clock: Callable[[str], float] = _wall
) -> dict[str, Timing]:
    """Time each provider once a round, in turn, so that a drift of the machine meets all of them alike.

    The order alternates from round to round. Warm-up calls are not counted. ``clock`` gives the seconds of a
    provider by its name.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            start = clock(name)
            steps[name]()
            seconds[name].append(clock(name) - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def speedup(baseline: Timing, other: Timing) -> tuple[float, float, float]:
    """How many times faster ``other`` is: median, 20 % and 80 % quantile of the ratios round by round."""
    return quantiles([b / o for b, o in zip(baseline.seconds, other.seconds, strict=True)])


def check_losses(losses: Mapping[str, float], tolerance: float) -> None:
    """Refuse to compare providers whose first losses, on the same weights and images, differ.

    Raises:
        LossesDiffer: names the losses.
    """
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= tolerance * abs(high):
        shown = ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
        raise LossesDiffer(f"losses differ by more than {tolerance:g}: {shown}; no ratio is reported")


def saved_bytes(objective: nn.Module, images: Any, mask: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward: unique storages, parameters and inputs excluded."""
    given = [*objective.parameters(), *objective.buffers(), *tree_leaves(images), mask]
    own = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(images, mask)["loss"]
    with torch.autocast(mask.device.type, enabled=False):  # a backward pass belongs outside
        loss.backward()
    return sum(kept.values())


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of a row; no host or user name."""
    import timm

    return {
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": timm.__version__,
        "commit": commit_of(),
        "date": datetime.date.today().isoformat(),
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows of :data:`COLUMNS` to a CSV, with a header where the file is new; fewer older columns are filled up.

    Raises:
        ValueError: a row has a column that the schema does not know.
    """
    unknown = sorted({key for row in rows for key in row} - set(COLUMNS))
    if unknown:
        raise ValueError(f"columns {unknown} are not in the schema; it has {', '.join(COLUMNS)}")
    rows = [*read_rows(path), *rows] if path.exists() else rows
    command.write_csv(path, COLUMNS, rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV that :func:`append_rows` wrote; a column it lacks is empty."""
    return [dict.fromkeys(COLUMNS, "") | row for row in command.read_csv(path)]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return name + (" with AMX" if "amx_bf16" in flags else " with AVX-512 BF16" if "avx512_bf16" in flags else "")


def commit_of(checkout: Path = ROOT) -> str:
    """Short, with a mark where the checkout has changes; "unknown" without git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")
