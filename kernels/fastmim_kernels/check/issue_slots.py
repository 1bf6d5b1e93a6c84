"""The third roof of a kernel: the issue slots of an SM's four schedulers, beside its bytes and its FLOPs.

A scheduler issues one warp instruction a cycle. The machine code says which instructions there are and its backward
branches where loops are; the author of the kernel (``AotCase.trips``) says how often each runs in a launch. Counted:

- every instruction as one slot, a tensor-core instruction too: what it occupies beyond is the roof of FLOPs;
- both sides of every branch but loops, hence too much where a kernel has a rare side;
- a predicated instruction whether or not its predicate holds: it is issued all the same;
- of loops that ``trips`` does not name, nothing: those in which the last program to arrive adds partial sums.

Nothing is added for latencies, barriers or half-rate pipes (float32 on sm_80, the exponential): it is a floor.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.aot_case import AotCase

TABLE = Path(__file__).with_name("issue_slots.json")
"""What ``benchmarks/kernel_report.py`` wrote of the machine code for :data:`ARCH`."""
ARCH = 90
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32",
           torch.int64: "i64", torch.uint8: "u8", torch.bool: "u8", torch.int8: "i8"}
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


class Loop(NamedTuple):
    """Addresses of the first and the last instruction."""

    first: int
    last: int


class Code(NamedTuple):
    """Instructions of a warp by where they stand.

    Attributes:
        once: Outside of all loops.
        loops: Of each loop, by its first instruction, those in no inner loop, and the numbers of the loops around it.
    """

    once: int
    loops: tuple[tuple[int, tuple[int, ...]], ...]

    def row(self) -> dict[str, Any]:
        """As a row of the report has it; :func:`as_code` is the inverse."""
        return {"once": self.once, "loops": [[own, list(outer)] for own, outer in self.loops]}

    def issued(self, trips: Sequence[float]) -> float:
        """Instructions a warp issues: each times the trips of all loops around it; a loop beyond ``trips`` has none."""
        given = [*trips, *[0.0] * len(self.loops)]
        return self.once + sum(own * math.prod((given[i], *(given[o] for o in outer)))
                               for i, (own, outer) in enumerate(self.loops))


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


def code_of(sass: str) -> Code:
    """Instructions of a kernel's machine code, by loop."""
    addresses, loops = instructions(sass)
    around = [tuple(i for i, loop in enumerate(loops) if loop.first <= a <= loop.last) for a in addresses]
    outer = [tuple(i for i, other in enumerate(loops) if other.first <= loop.first and loop.last <= other.last
                   and other != loop) for loop in loops]
    own = [sum(1 for inside in around if inside and set(inside) == {i, *outer[i]}) for i in range(len(loops))]
    return Code(sum(not inside for inside in around), tuple(zip(own, outer, strict=True)))


@lru_cache(maxsize=1)
def table() -> dict[tuple[str, str], Code]:
    """The committed counts by (module, case)."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return {(row["module"], row["case"]): as_code(row) for row in rows}


def as_code(row: Mapping[str, Any]) -> Code:
    """From ``once`` and ``loops`` of a row of the report."""
    return Code(row["once"], tuple((own, tuple(outer)) for own, outer in row["loops"]))


@lru_cache(maxsize=1)
def _shipped() -> dict[Any, list[tuple[AotCase, Code]]]:
    """Cases and their code by the Python function of the kernel."""
    found: dict[Any, list[tuple[AotCase, Code]]] = {}
    for module in sorted({module for module, _ in table()}):
        for case in importlib.import_module(f"fastmim_kernels.{module}").aot_cases():
            if (module, case.name) in table():
                found.setdefault(case.kernel.fn, []).append((case, table()[module, case.name]))
    return found


def launched(kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any]) -> float | None:
    """Warp instructions of a launch, by the code of the :func:`nearest` case; None for a kernel that no case describes.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Programs along each axis.
        arguments: All of them by name, tensors as they are.
    """
    found = nearest(kernel, arguments)
    if found is None:
        return None
    case, code = found
    trips = case.trips({**arguments, "grid": tuple(grid)}) if case.trips else ()
    return code.issued(trips) * arguments.get("num_warps", case.num_warps) * math.prod(grid)


def nearest(kernel: Any, arguments: Mapping[str, Any]) -> tuple[AotCase, Code] | None:
    """The shipped configuration most like a launch: types of pointers and what is absent count before sizes."""
    cases = _shipped().get(kernel.fn)
    return min(cases, key=lambda pair: distance(pair[0], arguments)) if cases else None


def distance(case: AotCase, arguments: Mapping[str, Any]) -> tuple[int, float]:
    """(Pointers of another type and switches set otherwise, sizes in powers of two) between a case and a launch."""
    other, sizes = 0, abs(math.log2(arguments.get("num_warps", case.num_warps) / case.num_warps))
    for name in case.kernel.arg_names:
        value, mine = arguments.get(name), case.constexprs.get(name)
        if isinstance(value, torch.Tensor):
            other += case.signature.get(name) != f"*{_DTYPES[value.dtype]}"
        elif value is None:
            other += name in case.signature
        elif name in case.constexprs and not isinstance(value, bool) and isinstance(value, int) and value and mine:
            sizes += abs(math.log2(value / mine))
        elif name in case.constexprs:
            other += value != mine
    return other, sizes
