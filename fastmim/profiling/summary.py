"""Where the time went, by the names of our ops: every microsecond belongs to one row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_OUTSIDE = "(between ops)"
_PHASES = ("data", "forward", "backward", "update")


@dataclass(frozen=True)
class Row:
    """One op: microseconds of it and of everything that it called, its share of all, how often it ran."""

    name: str
    microseconds: float
    share: float
    calls: int


def op_name(name: str) -> str | None:
    """Our name of a profiler event: of an op, or of the autograd function around it; None for others.

    >>> op_name("fastmim::mlp"), op_name("fastmim::mlpBackward"), op_name("aten::mm")
    ('fastmim::mlp', 'fastmim::mlp_backward', None)
    """
    # The engine's own event has the same name behind its own; the function is an event inside it.
    if not name.startswith("fastmim::"):
        return None
    op = name.removesuffix("Backward")
    return op if op == name else f"{op}_backward"


def summarise(events: Iterable[Any], on_gpu: bool) -> list[Row]:
    """Rows from the longest to the shortest.

    Args:
        events: ``torch.profiler.profile.events()``.
        on_gpu: Time of kernels on the GPU; else of the CPU.
    """
    times: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        if event.device_type.name != "CPU":
            continue
        owner, is_first = _owner(event)
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[owner] += own
        calls[owner] += is_first
    total = sum(times.values()) or 1.0
    rows = [Row(name, time, time / total, calls[name]) for name, time in times.items() if time > 0]
    return sorted(rows, key=lambda row: -row.microseconds)


def _owner(event: Any) -> tuple[str, bool]:
    """The row that an event's own time belongs to, and whether the event is the row's op itself.

    The outermost op of ours around it, else the optimiser, else the event itself.
    """
    name, found = _plain(event.name), event
    above = event
    while above is not None:
        ours = op_name(above.name)
        if ours is None and above.name.startswith("Optimizer.step"):
            ours = "optimizer step"
        if ours is not None:
            name, found = ours, above
        above = above.cpu_parent
    return name, found is event


def _plain(name: str) -> str:
    return _OUTSIDE if name in _PHASES or name.startswith(("ProfilerStep", "autograd::engine")) else name


def as_text(rows: list[Row], steps: int, where: str, top: int = 25) -> str:
    """A table; what is beyond ``top`` is one row."""
    shown, rest = rows[:top], rows[top:]
    if rest:
        shown = [*shown, Row(f"({len(rest)} more)", *_sum(rest))]
    width = max([len(row.name) for row in shown], default=10)
    lines = [f"{'op':{width}}  {'ms a step':>10}  {'share':>6}  {'calls a step':>12}   ({where} time)"]
    lines += [
        f"{row.name:{width}}  {row.microseconds / steps / 1e3:10.3f}  {row.share:6.1%}  {row.calls / steps:12.1f}"
        for row in shown
    ]
    return "\n".join(lines)


def _sum(rows: list[Row]) -> tuple[float, float, int]:
    return sum(r.microseconds for r in rows), sum(r.share for r in rows), sum(r.calls for r in rows)
