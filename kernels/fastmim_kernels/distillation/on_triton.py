"""Self-distillation's loss and gradient by :mod:`.kernels`: their tiles, shares of the groups, and launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase
from ..common.device import processors
from ..common.sizes import cdiv, next_power_of_2
from .kernels import distillation_backward, distillation_forward
from .layout import mean_weight

BLOCKS = 4
"""Programs that a multiprocessor is to hold at once."""
CHUNK = 4096
"""Codes of a program, for all teacher views together; 32 values a thread."""
MOST = 1024
"""Shares of the groups, at most."""


def config(views: int, teachers: int, codes: int) -> dict[str, int]:
    """Tile and pipelines: the loop over groups loads ahead where each is two rows, else the loop over student views."""
    padded = next_power_of_2(teachers)
    block = max(64, min(CHUNK // padded, next_power_of_2(codes)))
    ahead = {"OUTER": 3, "INNER": 1} if views == 1 else {"OUTER": 1, "INNER": 3}
    return {"V": views, "V_PAD": next_power_of_2(views), "U": teachers, "U_PAD": padded, "EVEN": codes % block == 0,
            "BLOCK": block, **ahead, "num_warps": max(1, min(4, block * padded // 1024))}


def finish(chunks: int) -> dict[str, int]:
    """Tile of what the last program of a share puts together, and how many shares the last of all adds up."""
    wide = next_power_of_2(chunks)
    return {"SPLITS": chunks, "CHUNKS": wide, "ROWS": max(1, min(16, 1024 // wide)), "MOST": MOST}


def each_of(groups: int, chunks: int, device: torch.device) -> int:
    """Groups of a program: so many that all programs run at once."""
    return cdiv(groups, min(groups, MOST, cdiv(BLOCKS * processors(device), chunks)))


def forward(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, student_temp: Tensor,
            teacher_temp: Tensor, own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments and results as the op ``fastmim::distillation``."""
    views, groups, codes = student.shape
    device, teachers = student.device, teacher.shape[0]

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    found = make(2, views, groups), make(2, teachers, groups)
    if not groups:
        zero = torch.zeros(2, dtype=torch.float32, device=device)
        return zero[0].clone(), zero[1].clone(), *found
    cfg = config(views, teachers, codes)
    chunks = cdiv(codes, cfg["BLOCK"])
    each = each_of(groups, chunks, device)
    shares = cdiv(groups, each)
    loss, entropy, end = make(), make(), finish(chunks)
    distillation_forward.run(
        *_plain(student, teacher, centre, weight, student_temp, teacher_temp),
        make(2 + teachers, views * groups, end["CHUNKS"]), make(3, teachers * groups, end["CHUNKS"]), make(2, shares),
        arrival.counters(1 + shares, device), *found, loss, entropy, groups, each, codes,
        mean_weight(views, teachers, groups, own), OWN=own, **end, **cfg, grid=(shares, chunks), warmup=False)
    return loss, entropy, *found


def backward(grad: Tensor, student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None,
             student_temp: Tensor, teacher_temp: Tensor, student_rows: Tensor, teacher_rows: Tensor, own: bool
             ) -> Tensor:
    """Launch the kernel; arguments and result as the op ``fastmim::distillation_backward``."""
    views, groups, codes = student.shape
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if groups:
        cfg = config(views, len(teacher), codes)
        chunks = cdiv(codes, cfg["BLOCK"])
        each = each_of(groups, chunks, student.device)
        distillation_backward.run(
            grad, *_plain(student, teacher, centre, weight, student_temp, teacher_temp), student_rows, teacher_rows,
            out, groups, each, codes, mean_weight(views, len(teacher), groups, own), OWN=own, **cfg,
            grid=(cdiv(groups, each), chunks), warmup=False)
    return out


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def aot_cases() -> list[AotCase]:
    """iBOT's patches (8,192 codes, weights) and class tokens (12 crops); DINO's class tokens (65,536 codes)."""
    cases = []
    types = {"p_student": "*bf16", "p_teacher": "*bf16", "p_out": "*bf16", "p_counter": "*i32", "groups": "i32",
             "per_program": "i32", "codes": "i32", "share": "fp32"}
    shapes = (("ibot_patches", 1, 1, 8192, True), ("ibot_views", 12, 2, 8192, False),
              ("dino_views", 10, 2, 65536, False))
    for name, views, teachers, codes, weighted in shapes:
        cfg = config(views, teachers, codes)
        warps, put = cfg.pop("num_warps"), finish(cdiv(codes, cfg["BLOCK"]))
        for direction, kernel in (("forward", distillation_forward), ("backward", distillation_backward)):
            constexprs = {"OWN": teachers == 1, **cfg, **(put if direction == "forward" else {}),
                          **({} if weighted else {"p_weight": None})}
            signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constexprs}
            divisible = tuple(n for n, kind in signature.items() if kind[0] == "*" or n == "codes")
            # Two chunks are 64 bits; the report counts the loop that reads them as often as that over the groups.
            cases.append(AotCase(f"{direction}/{name}", kernel, signature, constexprs, warps, 2, divisible,
                                 wide_target=0.9 if name == "ibot_patches" else 0.95, quick=name != "dino_views",
                                 trips=_forward_trips if direction == "forward" else _trips))
    return cases


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Groups of a program, and student views of each group."""
    return (a["per_program"],) if a["V"] == 1 else (a["per_program"], a["V"])


def _forward_trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """The same, and what the last of a share does with its rows."""
    return (*_trips(a), a["per_program"] * a["V"] / a["ROWS"] / a["grid"][1])
