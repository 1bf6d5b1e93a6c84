"""The issue-slot roof: loops found in machine code, nested trips, the committed counts, launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from fastmim_kernels.check import aot, issue_slots  # noqa: E402
from fastmim_kernels.check.issue_slots import code_of, instructions, launched  # noqa: E402
from fastmim_kernels.mlp.gelu_on_triton import config, gelu_forward  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

# Two loops in one, a branch forwards, a predicated branch backwards, the branch to itself and padding at the end.
NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   FMUL R2, R2, R3 ;
.L_x_3:
        /*0060*/                   FMUL R2, R2, R3 ;
        /*0070*/                   FMUL R2, R2, R3 ;
        /*0080*/             @!UP0 BRA `(.L_x_3) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
        /*00c0*/                   NOP;
"""


def test_nested_loops_multiply() -> None:
    _, loops = instructions(NESTED)
    assert loops == [(0x10, 0x90), (0x30, 0x40), (0x60, 0x80)]
    code = code_of(NESTED)
    # Within: 4 of the outer loop alone, 2 a trip of the first inner loop, 3 a trip of the second.
    assert code.issued((10, 5, 2)) == 2 + 10 * (4 + 2 * 5 + 3 * 2)
    # The author names the outer loop and the first in it.
    assert code.issued((10, 5)) == 2 + 10 * (4 + 2 * 5)


def test_of_a_compiled_kernel(tmp_path: Path) -> None:
    """What stands in a loop of the machine code grows with what the loop of the source computes."""
    (tmp_path / "summing.py").write_text(SUM)
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import summing as s\n"
            "from fastmim_kernels.check.issue_slots import as_code\n"
            "short, long = (as_code(s.row(n)) for n in (1, 9))\n"
            "print(*(sum(own for own, _ in code.loops) for code in (short, long)))")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ROOT / "kernels")], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    # Eight more multiplications of one value a thread in every copy of the body: the compiler may have unrolled it.
    assert short and long > short and (long - short) % 8 == 0


SUM = '''
import triton, triton.language as tl
from fastmim_kernels.common.aot_case import AotCase
from fastmim_kernels.check.aot import compile_case

@triton.jit
def scan(p_x, p_y, n, B: tl.constexpr, TIMES: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + o)
    i = 0
    while i < n:
        for _ in tl.static_range(TIMES):
            x = x * 1.5
        x += tl.load(p_x + o, volatile=True)
        i += 1
    tl.store(p_y + o, x)

def row(times):
    kinds = {"p_x": "*fp32", "p_y": "*fp32", "n": "i32"}
    return compile_case(AotCase("scan", scan, kinds, {"B": 128, "TIMES": times}, 4, 1, ("p_x", "p_y")), 90)
'''


def test_a_launch_by_hand() -> None:
    """A program's tiles of rows, its warps, all programs; the sizes of the nearest shipped configuration."""
    n, grid = 512, (66, 2)
    code = issue_slots.table()["mlp.gelu_on_triton", f"gelu/forward/swin_b-bf16-n{n}"]
    x = torch.empty(0, dtype=torch.bfloat16)
    arguments = {"p_x": x, "p_bias": torch.empty(0), "p_out": x, "rows": 5280, "N": n, **config(n)}
    tiles = 5280 / arguments["BLOCK_R"] / grid[0]
    assert len(code.loops) == 1
    assert launched(gelu_forward, grid, arguments) == (code.once + tiles * code.loops[0][0]) * 4 * 66 * 2


@pytest.mark.parametrize("module", aot.kernel_modules())
def test_the_committed_counts_are_those_of_the_report_and_of_these_sources(module: str) -> None:
    """As fresh as ``kernel_report.json``: the key is a hash of sources, types, sizes and Triton's version."""
    report = json.loads((ROOT / "benchmarks" / "results" / "kernel_report.json").read_text())
    if report["triton"] != triton.__version__:
        pytest.skip(f"the report is Triton {report['triton']}'s")
    rows = {row["case"]: row for row in report["rows"] if (row["module"], row["arch"]) == (module, issue_slots.ARCH)}
    for case in aot.own_cases_of(module):
        if issue_slots.ARCH in case.archs:
            row = rows[case.name]
            assert row["key"] == case.key(issue_slots.ARCH), f"{case.name}: run benchmarks/kernel_report.py --record"
            assert issue_slots.table()[module, case.name] == issue_slots.as_code(row)
