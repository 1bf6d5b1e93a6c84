"""The issue-slot roof: loops found in machine code, nested trips, the floor in milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastmim_kernels.check.issue_slots import floor_ms, instructions, weighted  # noqa: E402

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
    addresses, loops = instructions(NESTED)
    assert loops == [(0x10, 0x90), (0x30, 0x40), (0x60, 0x80)]
    # Within: 4 of the outer loop alone, 2 a trip of the first inner loop, 3 a trip of the second.
    assert weighted(addresses, loops, (10, 5, 2)) == (10 * (4 + 2 * 5 + 3 * 2), 2)


def test_floor() -> None:
    assert floor_ms(1000, 132 * 1.755e6) == pytest.approx(1000)  # a thousand cycles each on every SM, 1.755e6 times


SUM = '''
import triton, triton.language as tl
from fastmim_kernels.common.aot_case import AotCase
from fastmim_kernels.check.issue_slots import issue_slots

@triton.jit
def add(p_x, p_y, n, m, B: tl.constexpr):
    o = tl.arange(0, B)
    for i in tl.range(0, n):
        x = tl.load(p_x + i * B + o)
        for j in tl.range(0, m):
            x = x * x + tl.load(p_x + j * B + o)
        tl.store(p_y + i * B + o, x)

def slots(trips, block=128):
    kinds = {"p_x": "*fp32", "p_y": "*fp32", "n": "i32", "m": "i32"}
    return issue_slots(AotCase("sum", add, kinds, {"B": block}, 4, 1, ("p_x", "p_y"), trips=trips), 90).unit
'''


def test_of_a_compiled_kernel(tmp_path: Path) -> None:
    """The compiler may unroll a loop into several: a case that names another number of loops is refused."""
    (tmp_path / "summing.py").write_text(SUM)
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import summing as s\n"
            "for loops in range(1, 9):\n"
            "    try: s.slots((1,) * loops); break\n"
            "    except ValueError as error: assert 'give one a loop' in str(error)\n"
            "print(loops, s.slots((3,) * loops) / s.slots((1,) * loops))")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ROOT / "kernels")], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loops, ratio = done.stdout.split()
    assert int(loops) >= 2 and 3 < float(ratio) < 9  # one level's trips at least, two levels' at most
