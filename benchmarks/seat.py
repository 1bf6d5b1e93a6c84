"""A provider in the process that it is measured in, and the way to call it there."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from benchmarks import harness, measure, providers
from benchmarks.processes import Remote
from benchmarks.providers import PRESETS, Case, Unavailable
from fastmim.engine.distributed import World
from fastmim.engine.host_memory import keep_freed_memory

PROFILED_STEPS = 4


class Seat:
    """Builds a provider for a case and runs its steps; methods take nothing and return what can be pickled.

    Args:
        apart: This process is the provider's own, so that it may be set up as the provider's users would.

    Raises:
        Unavailable: the provider cannot be built.
    """

    def __init__(
        self, name: str, case: Case, reference: str | None, threads: int | None, apart: bool = True,
        world: World | None = None, clock: str = "wall",
    ) -> None:  # fmt: skip
        if threads:
            torch.set_num_threads(threads)
        if apart and case.device == "cpu" and name.removesuffix(providers.COMPILED) in PRESETS:
            keep_freed_memory()  # as train() does
        source = case.weights()
        self.case, self.name = case, name
        self.images, self.mask = case.inputs(source)
        self.provider = providers.build(name, case, source, reference=reference, world=world)
        del source
        self.clock = measure.clock_for(case.device, clock)

    def losses(self) -> tuple[float, float]:
        """On the given weights, and after two updates."""
        return measure.first_losses(self.provider, self.images, self.mask)

    def step(self) -> measure.Phases:
        """One training step."""
        return measure.run_step(self.provider, self.images, self.mask, self.clock)[0]

    def memory(self) -> tuple[dict[str, str], tuple[float, float]]:
        """CSV columns of peak memory over three steps and of what autograd keeps; the losses of those steps."""
        measure.return_freed_memory()
        measure.reset_peak_memory(self.case.device)
        start = measure.resident() if self.case.device == "cpu" else torch.cuda.memory_allocated()
        # AdamW's moments exist from the first update on: the second step is the first whole one.
        losses = self.losses()
        columns = {"start_memory_gib": f"{start / measure.GIB:.3f}", "loss": f"{losses[0]:.6f}"}
        columns |= measure.peak_memory(self.case.device)
        if not self.name.endswith(providers.COMPILED) and "recompute" not in self.name:
            # What a compiled graph or a checkpoint keeps does not pass through the hooks.
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.dtype == "bf16"):
                kept = harness.saved_bytes(self.provider.module, self.images, self.mask)
            columns["saved_mb_per_image"] = f"{kept / self.case.batch / 1e6:.1f}"
        return columns, losses

    def profile(self) -> list[tuple[str, float]]:
        """(op, seconds a step by itself) under torch's profiler, after steps that it records and forgets.

        Without those the first recorded step pays for the profiler's own memory, several times over.
        """
        for steps in (2, PROFILED_STEPS):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
                for _ in range(steps):
                    self.step()
        return [(e.key, e.self_cpu_time_total / 1e6 / PROFILED_STEPS) for e in recorded.key_averages()]

    def energy(self) -> float:
        """Joules an image, from NVML's counter."""
        with measure.nvml() as (lib, handle):
            return measure.joules_per_image(
                lambda: self.step() and None,
                self.case.batch,
                lambda: lib.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
                wait=torch.cuda.synchronize,
            )


class Caller(Protocol):
    """Calls a method of a :class:`Seat` by its name."""

    def call(self, method: str) -> Any: ...
    def close(self) -> None: ...


class Here:
    """A :class:`Seat` in this process, for data-parallel ranks."""

    def __init__(self, *args: Any) -> None:
        self._seat = Seat(*args)

    def call(self, method: str) -> Any:
        return getattr(self._seat, method)()

    def close(self) -> None:
        del self._seat


def take_seats(
    names: list[str], case: Case, reference: str | None, threads: int | None, *, apart: bool,
    world: World | None = None, clock: str = "wall",
) -> tuple[dict[str, Caller], dict[str, tuple[float, float]], list[str]]:  # fmt: skip
    """Provider → caller and → its losses, of those that can be built; and why the others cannot.

    Raises:
        RuntimeError: a provider failed in another way.
    """
    seats: dict[str, Caller] = {}
    losses: dict[str, tuple[float, float]] = {}
    reasons = []
    for name in names:
        providers.check_name(name)
        try:
            arguments = (name, case, reference, threads, apart, world, clock)
            seat: Caller = Remote(Seat, *arguments) if apart else Here(*arguments)
            losses[name] = seat.call("losses")
            seats[name] = seat
        except (RuntimeError, Unavailable) as error:
            reasons.append(reason_of(error))
    return seats, losses, reasons


def call_apart(method: str, name: str, case: Case, args: Any) -> Any:
    """What a provider's seat answers in a new process that ends with it, or (a string) why it is not there."""
    providers.check_name(name)
    seat = Remote(Seat, name, case, args.reference, args.threads)
    try:
        return seat.call(method)
    except RuntimeError as error:
        return reason_of(error)
    finally:
        seat.close()


def reason_of(error: Exception) -> str:
    """Why a provider is not there.

    Raises:
        Exception: ``error`` itself, if it is none of its absence.
    """
    text = str(error)
    if isinstance(error, Unavailable):
        return text
    before, found, reason = text.partition("Unavailable: ")
    if not found:
        raise error
    return reason
