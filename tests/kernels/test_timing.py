"""Time of a call on a GPU that is kept busy, on a made-up GPU: a queue, a host clock and a device clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmim_kernels.check import timing

LAUNCH = 5e-6
"""Seconds of the host for a launch."""


class Gpu:
    """Work begins when the host has asked for it and what came before is done; ``filling`` seconds a fill."""

    def __init__(self, filling: float) -> None:
        self.host = self.free = 0.0
        self.filling = filling

    def launch(self, seconds: float, host: float = LAUNCH) -> float:
        self.host += host
        self.free = max(self.free, self.host) + seconds
        return self.free

    def wait(self) -> None:
        self.host = max(self.host, self.free)


class Event:
    gpu: Gpu

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = self.gpu.launch(0.0)

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(filling=90e-6)
    monkeypatch.setattr(Event, "gpu", made, raising=False)

    class Filler:
        def zero_(self) -> None:
            made.launch(made.filling)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Filler())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.host)
    return made


@pytest.mark.parametrize("host, kernel", [(200e-6, 10e-6), (200e-6, 500e-6), (LAUNCH, 3e-6)])
def test_the_host_is_not_measured(host: float, kernel: float, gpu: Gpu) -> None:
    """A call that takes the host 200 us to launch and the GPU 10 us to run is one of 10 us."""
    assert timing.gpu_microseconds(lambda: gpu.launch(kernel, host)) == pytest.approx(1e6 * kernel)


def test_calls_that_wait_for_the_gpu_come_to_an_end(gpu: Gpu) -> None:
    """Such as torch's way of an op, which asks how many tokens are masked: no work before them lasts until they are
    asked for. They are timed with the wait of the host."""
    def run() -> None:
        gpu.launch(10e-6, 200e-6)
        gpu.wait()

    assert timing.gpu_microseconds(run) == pytest.approx(10 + 200, rel=0.1)


def test_a_round_in_which_the_gpu_waited_is_repeated(gpu: Gpu) -> None:
    """The fills shrink to a tenth after they were measured: too few, until there are sixteen times as many."""
    rounds: list[int] = []
    original = timing._round

    def watched(run: Any, calls: int, filler: Any, fills: int) -> tuple[float, bool]:
        gpu.filling = 9e-6
        rounds.append(fills)
        return original(run, calls, filler, fills)

    timing._round = watched
    try:
        assert timing.gpu_microseconds(lambda: gpu.launch(10e-6, 200e-6)) == pytest.approx(10)
    finally:
        timing._round = original
    assert len(rounds) > timing.ROUNDS and rounds[-timing.ROUNDS :] == [rounds[-1]] * timing.ROUNDS
    assert sorted(rounds) == rounds and rounds[-1] == rounds[0] * 2 ** (len(rounds) - timing.ROUNDS)
