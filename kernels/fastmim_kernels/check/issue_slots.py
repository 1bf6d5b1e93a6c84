"""The third roof of a kernel: the issue slots of an SM's four schedulers, beside its bytes and its FLOPs.

A scheduler issues one warp instruction a cycle. The machine code says which instructions there are, its backward
branches where loops are, and the author of the kernel (``AotCase.trips``) how often each runs. What is counted:

- every instruction as one slot, a tensor-core instruction too: what it occupies beyond is the roof of FLOPs;
- both sides of every branch but loops, hence too much where a kernel has a rare side;
- a predicated instruction whether or not its predicate holds: it is issued all the same.

Nothing is added for latencies, barriers or half-rate pipes (float32 on sm_80, the exponential): it is a floor.

    python -m fastmim_kernels.check.issue_slots --match REGEX [--arch 90] [--units 61440]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..common.aot_case import AotCase
from . import aot

SCHEDULERS = 4  # of an SM, on sm_80 to sm_100
H100_SMS, H100_GHZ = 132, 1.755  # SXM5: multiprocessors, boost clock
V2_BASE_WINDOW_HEADS = 128 * (2 * 16 * 4 + 2 * 4 * 8 + 18 * 1 * 16)
"""Windows of 144 tokens times heads that SwinV2-B at 192 px and batch 128 attends to in one pass."""

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


class Loop(NamedTuple):
    """Addresses of the first and the last instruction."""

    first: int
    last: int


class Slots(NamedTuple):
    """Warp instructions a scheduler: within loops for one unit of work, and outside of them, once a program."""

    unit: float
    once: float


def instructions(sass: str) -> tuple[list[int], list[Loop]]:
    """Addresses of the instructions of a kernel's machine code, and its loops, by their first instruction.

    Args:
        sass: What ``nvdisasm -c`` writes. A branch to itself, which ends the code, and what pads it are left out.
    """
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif match := _INSTRUCTION.search(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            found.append((address, match[2], match[3]))
    ends: dict[int, int] = {}
    for address, opcode, operands in found:
        target = re.search(r"\.L_x_\d+", operands)
        if opcode == "BRA" and target and labels.get(target[0], address) <= address:
            ends[labels[target[0]]] = max(address, ends.get(labels[target[0]], 0))
    loops = [Loop(first, last) for first, last in sorted(ends.items()) if first != last]
    return [address for address, opcode, _ in found if opcode != "NOP" and ends.get(address) != address], loops


def weighted(addresses: Sequence[int], loops: Sequence[Loop], trips: Sequence[float]) -> tuple[float, float]:
    """Instructions a warp issues (within loops, outside of them): each times the trips of all loops around it."""
    inside = outside = 0.0
    for address in addresses:
        weight, looped = 1.0, False
        for loop, count in zip(loops, trips, strict=True):
            if loop.first <= address <= loop.last:
                weight, looped = weight * count, True
        inside, outside = (inside + weight, outside) if looped else (inside, outside + weight)
    return inside, outside


def issue_slots(case: AotCase, arch: int) -> Slots:
    """Slots of a kernel that is compiled for ``sm_<arch>``.

    Raises:
        ValueError: ``case.trips`` does not name every loop of the machine code.
    """
    addresses, loops = instructions(aot.disassembled(aot.compiled_case(case, arch).asm["cubin"]))
    if len(loops) != len(case.trips):
        raise ValueError(f"{case.name}: trips={case.trips} for {len(loops)} loops on sm_{arch}; give one a loop")
    inside, outside = weighted(addresses, loops, case.trips)
    return Slots(inside * case.num_warps / SCHEDULERS, outside * case.num_warps / SCHEDULERS)


def floor_ms(slots: float, units: float, sms: int = H100_SMS, ghz: float = H100_GHZ) -> float:
    """Least time in ms for ``units`` of work of ``slots`` each."""
    return slots * units / sms / ghz / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--match", required=True, help="regular expression on module/case")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--units", type=float, default=V2_BASE_WINDOW_HEADS, help="default: SwinV2-B, batch 128")
    args = parser.parse_args(argv)
    for module in aot.kernel_modules():
        for case in aot.cases_of(module):
            if case.trips and re.search(args.match, f"{module}/{case.name}"):
                for arch in sorted({*args.arch} & {*case.archs}):
                    slots = issue_slots(case, arch)
                    print(f"{case.name:60} sm_{arch} {slots.unit:8.0f} slots a unit, {slots.once:6.0f} a program, "
                          f"{floor_ms(slots.unit, args.units):6.2f} ms")


if __name__ == "__main__":
    main()
