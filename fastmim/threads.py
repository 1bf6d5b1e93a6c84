"""How many threads the C libraries start, and how they wait for each other: settled before torch loads them.

The command does this for its own process (:func:`fastmim.cli.entry`); importing fastmim changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SPINS = "50000"
"""Turns of a loop that a thread waits for the others before it sleeps: longer than the gaps between the parallel
regions of a step, so that a quiet machine loses nothing beyond noise.

GNU's OpenMP spins 300,000 turns, which are milliseconds. Where another program has a core, the thread that is waited
for does not run, and the one that spins keeps it from running: a step takes twice as long and more. Fewer turns help
a busy machine more and cost a quiet one: 1,000 a sixth of its speed (``benchmarks/bench_busy.py``).
"""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_ON_THIS_MACHINE = (
    "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"
)  # fmt: skip


def thread_settings(env: Mapping[str, str], *, allowed: int, quota: float | None) -> dict[str, str]:
    """What to add to the environment of a process that trains; nothing that it says already.

    The ranks of a machine share its cores where the launcher has bound none of them. Data workers are not taken off:
    on a CPU they work a small share of the time, and a thread less would cost its whole core.

    Args:
        env: of the process.
        allowed: cores that it may run on.
        quota: cores' worth of time that its control group may use, None: all.
    """
    found = {} if any(env.get(name) for name in _WAITING) else {"GOMP_SPINCOUNT": SPINS}
    if env.get("OMP_NUM_THREADS") or env.get("MKL_NUM_THREADS"):
        return found
    ranks = next((int(env[name]) for name in _ON_THIS_MACHINE if env.get(name, "").isdecimal()), 1)
    unbound = allowed == os.cpu_count()
    share = allowed // max(ranks, 1) if unbound else allowed
    cores = max(1, min(share, int(quota or allowed)))
    # Where nothing is short, torch's own choice stays: the physical cores.
    return found | ({"OMP_NUM_THREADS": str(cores)} if cores < allowed else {})


def settle_threads() -> None:
    """Add :func:`thread_settings` to the environment of this process, before anything loads OpenMP."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.update(thread_settings(os.environ, allowed=allowed, quota=cgroup_quota()))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of processor time that this process' control groups (version 2) may use; None: no limit.

    Args:
        root: where they are mounted.
        own: names the process' own; those above it count too. In a container ``root`` is the container's.
    """
    quotas = []
    for group in _groups(own):
        try:
            limit, period = (root / group / "cpu.max").read_text(encoding="ascii").split()
            quotas.append(int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # "max": none
            continue
    return min(quotas, default=None)


def _groups(own: Path) -> list[Path]:
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    return [Path(name), *Path(name).parents]
