"""How many of a kernel's global bytes go through 128-bit accesses.

Triton's GPU dialect says how many bytes each load and store moves, once however many threads repeat it; the
PTX says how wide its instructions are; source lines join the two. Counting machine instructions alone would
weigh a scalar that every thread reads as heavily as a row.
"""

from __future__ import annotations

import re
from collections import defaultdict

LOOP_TRIPS = 16
"""Weight of one loop level: trip counts are not in the code, and loops run often."""

_ACCESS = re.compile(r"\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local|ttng\.async_tma_copy\w*|"
                     r"tt\.descriptor_(?:load|store))\b")
_POINTERS = re.compile(r"(?:tensor<((?:\d+x)+))?!tt\.ptr<\w*?(\d+)[\w]*>")
_MEMORY = re.compile(r"(?:memdesc|tensor)?<((?:\d+x)+)[a-z]+(\d+)")
_LOC_USE = re.compile(r"loc\((#loc\d*)\)\s*$")
_LOC_TAIL = re.compile(r"\s*loc\([^()]*(\([^()]*\))?\)\s*$")
_LOC_DEF = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_PTX_LOC = re.compile(r"\.loc\s+\d+\s+(\d+)\s+(\d+)")
_PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global((?:\.[\w:]+)*)|\bcp\.async\.\w+\.shared\.global\b.*?(0x[0-9a-f]+)")

Place = tuple[int, int]


def share_128(ttgir: str, ptx: str) -> float:
    """Share of the global bytes in accesses of 128 bits or more (TMA counts as such), loops weighted."""
    widths = _ptx_widths(ptx)
    by_line: dict[int, list[int]] = defaultdict(list)
    for (line, _), found in widths.items():
        by_line[line] += found
    total = wide = 0.0
    for place, amount, tma in _accesses(ttgir):
        bits = [128] if tma else widths.get(place) or by_line.get(place[0])
        if not bits:  # the access was optimised away
            continue
        total += amount
        wide += amount * sum(b for b in bits if b >= 128) / sum(bits)
    return wide / total if total else 1.0


def _accesses(ttgir: str) -> list[tuple[Place, float, bool]]:
    """(place, bytes × LOOP_TRIPS^depth, is TMA) of every global access."""
    lines = ttgir.splitlines()
    places = _places(lines)
    found: list[tuple[Place, float, bool]] = []
    regions: list[bool] = []
    for line in lines:
        code = _LOC_TAIL.sub("", line).strip()
        if code.startswith("}"):
            regions.pop()
        if (access := _ACCESS.search(code)) and (use := _LOC_USE.search(line)):
            tma = "tma" in access[1] or "descriptor" in access[1]
            types = code.rsplit(" : ", 1)[-1]
            shape = _MEMORY.search(types) if tma else _POINTERS.search(types)
            amount = 1
            for edge in (shape[1] or "").split("x")[:-1] if shape else []:
                amount *= int(edge)
            size = max(int(shape[2]), 8) / 8 if shape else 0
            depth = sum(regions)
            found.append((places.get(use[1], (0, 0)), amount * size * LOOP_TRIPS**depth, tma))
        if code.endswith("{"):
            regions.append("scf.for" in code or "scf.while" in code)
    return found


def _places(lines: list[str]) -> dict[str, Place]:
    """Innermost (line, column) of each location alias; names and call sites are looked through."""
    text = {m[1]: m[2] for line in lines if (m := _LOC_DEF.match(line.strip()))}

    def resolve(alias: str) -> Place:
        body = text.get(alias, "")
        if here := re.match(r'"[^"]*":(\d+):(\d+)', body):
            return int(here[1]), int(here[2])
        inner = re.search(r"#loc\d+", body)
        return resolve(inner[0]) if inner and inner[0] != alias else (0, 0)

    return {alias: resolve(alias) for alias in text}


def _ptx_widths(ptx: str) -> dict[Place, list[int]]:
    """Bits a thread of every global access instruction, by source place."""
    place: Place = (0, 0)
    found: dict[Place, list[int]] = defaultdict(list)
    lines = ptx.splitlines()
    inline = False
    for before, line in zip(["", *lines], lines, strict=False):
        if "begin inline asm" in line or "end inline asm" in line:
            inline = "begin" in line
        elif here := _PTX_LOC.search(line):
            # Within inline assembly every line of its text counts as a further source line; only the first is real.
            if not inline or "begin inline asm" in before:
                place = int(here[1]), int(here[2])
        elif access := _PTX_ACCESS.search(line):
            if access[2]:
                found[place].append(int(access[2], 16) * 8)
                continue
            vector = re.search(r"\.v(\d)", access[1])
            element = re.search(r"\.[busf](\d+)", access[1])
            assert element is not None, line
            found[place].append(int(element[1]) * (int(vector[1]) if vector else 1))
    return found
