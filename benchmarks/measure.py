"""Phases of a step, taken in turns; what memory, energy and a device's peak say about it."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.harness import Timing, quantiles

# Of the loss, relative: before the first update, and after two of them (which a missing update would miss).
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (5e-3, 1e-2)}
# Dense bf16 FLOP/s that the vendor states, for the share of the peak that a step reaches.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}
GIB = 2**30


class Clock(Protocol):
    """Marks in time; ``seconds`` between two of them are known after ``wait``."""

    def mark(self) -> Any: ...
    def wait(self) -> None: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """Wall clock of a device that works while the host waits."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        """Nothing is ever outstanding."""

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CpuClock(HostClock):
    """CPU seconds of the process, over its threads: for a machine that others use, where it has one thread."""

    def mark(self) -> float:
        return time.process_time()


class CudaClock:
    """Events in the stream: phases are told apart without a synchronisation between them."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3


def clock_for(device: str, kind: str = "wall") -> Clock:
    """The clock of a device type; "cpu" counts CPU seconds."""
    return CudaClock() if device == "cuda" else CpuClock() if kind == "cpu" else HostClock()


@dataclass(frozen=True)
class Phases:
    """Seconds of one step."""

    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


class Step(Protocol):
    """What is timed: a ``benchmarks.providers.Provider``."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor], None]
    update: Callable[[], None]


def run_step(step: Step, images: Tensor, mask: Tensor, clock: Clock) -> tuple[Phases, Tensor]:
    """One training step: its phases, and its loss before the update."""
    marks = [clock.mark()]
    loss = step.forward(images, mask)
    marks.append(clock.mark())
    step.backward(loss)
    marks.append(clock.mark())
    step.update()
    marks.append(clock.mark())
    clock.wait()
    return Phases(*(clock.seconds(a, b) for a, b in zip(marks, marks[1:], strict=False))), loss.detach()


def first_losses(step: Step, images: Tensor, mask: Tensor) -> tuple[float, float]:
    """Loss on the given weights, and after two updates. These steps are warm-up as well."""
    losses = [float(run_step(step, images, mask, HostClock())[1]) for _ in range(3)]
    return losses[0], losses[2]


def refusals(losses: Mapping[str, Sequence[float]], baseline: str, tolerances: Sequence[float]) -> dict[str, str]:
    """Provider → why it is not timed, for those whose losses are not the baseline's. NaN is never the same."""
    found = {}
    for name, own in losses.items():
        for when, loss, right, tolerance in zip(
            ("first loss", "loss after two updates"), own, losses[baseline], tolerances, strict=True
        ):
            if not abs(loss - right) <= tolerance * abs(right):
                found[name] = f"{when} {loss:.6f} is not {baseline}'s {right:.6f} (within {tolerance:g})"
                break
    return found


def interleave(steps: Mapping[str, Callable[[], Phases]], rounds: int) -> dict[str, list[Phases]]:
    """Each step once a round, in turn, in alternating order: a drift of the machine meets all of them alike."""
    phases: dict[str, list[Phases]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            phases[name].append(steps[name]())
    return phases


def speed_columns(phases: Sequence[Phases], images: int, baseline: Sequence[Phases]) -> dict[str, str]:
    """CSV columns: seconds, images/s and the speed over the baseline's with their spread, medians of the phases."""
    timing = Timing(tuple(p.total for p in phases))
    ratios = [b.total / p.total for b, p in zip(baseline, phases, strict=True)]
    rates = quantiles([images / s for s in timing.seconds])
    out = {}
    for column, values, digits in (("seconds", timing.quantiles(), 4), ("images_per_sec", rates, 3),
                                   ("ratio", quantiles(ratios), 3)):  # fmt: skip
        for suffix, value in zip(("", "_p20", "_p80"), values, strict=True):
            out[column + suffix] = f"{value:.{digits}f}"
    for name in ("forward", "backward", "optimizer"):
        out[f"{name}_s"] = f"{quantiles([getattr(p, name) for p in phases])[0]:.4f}"
    return out


def mfu(gflop_per_image: float, images_per_sec: float, device_name: str) -> float | None:
    """Share of the device's stated dense bf16 peak; None for a device without one in :data:`PEAKS`."""
    # The longest name first: no peak is known for a device that only shares a prefix.
    for name in sorted(PEAKS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_name):
            return gflop_per_image * 1e9 * images_per_sec / PEAKS[name]
    return None


def reset_peak_memory(device: str) -> None:
    """Forget the peak so far. Where the kernel cannot, the peak of the whole process counts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def return_freed_memory() -> None:
    """Give what was freed back to the system, so that building a model does not count as training it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, or its peak (``VmHWM``)."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(device: str) -> dict[str, str]:
    """CSV columns of the peak since :func:`reset_peak_memory`: the allocator's on a GPU, resident pages on a CPU."""
    if device != "cuda":
        return {"peak_memory_gib": f"{resident('VmHWM') / GIB:.3f}", "memory_kind": "resident"}
    columns = {"peak_memory_gib": f"{torch.cuda.max_memory_allocated() / GIB:.3f}", "memory_kind": "cuda allocator"}
    with contextlib.suppress(Exception), nvml() as (lib, handle):
        columns["nvml_memory_gib"] = f"{lib.nvmlDeviceGetMemoryInfo(handle).used / GIB:.3f}"
    return columns


@contextlib.contextmanager
def nvml() -> Any:
    """(pynvml, handle of the current device). Raises what pynvml raises where there is no driver."""
    import pynvml

    pynvml.nvmlInit()
    try:
        # By UUID: CUDA_VISIBLE_DEVICES renumbers CUDA's devices and not NVML's.
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    finally:
        pynvml.nvmlShutdown()


def joules_per_image(
    run: Callable[[], None],
    images: int,
    joules: Callable[[], float],
    *,
    least: float = 2.0,
    wait: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Energy of a stretch of at least ``least`` seconds of steps: the counter is too slow for a single one."""
    wait()
    steps, start, before = 0, now(), joules()
    while steps == 0 or now() - start < least:
        run()
        wait()
        steps += 1
    return (joules() - before) / (steps * images)
