"""Compiled code of the kernels, without a GPU: no spills, wide accesses, tensor cores where there is a dot.

The compiler runs in a process of its own: this one interprets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def compile_report(out: Path, *args: str) -> tuple[list[dict], subprocess.CompletedProcess[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_report.py"), "--out", str(out), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = json.loads(out.with_suffix(".json").read_text())["rows"] if out.with_suffix(".json").exists() else []
    return rows, done


def assert_clean(rows: list[dict], done: subprocess.CompletedProcess[str]) -> None:
    assert rows, done.stderr
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.endswith("  -"))


MODULES = sorted(f"{path.parent.name}.{path.stem}" for path in (ROOT / "kernels" / "fastmim_kernels").glob("*/*.py")
                 if re.search(r"^def aot_cases", path.read_text(), re.MULTILINE))


KNOWN = ROOT / "benchmarks" / "results" / "kernel_report.json"


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], subprocess.CompletedProcess[str]]:
    """Every shipped configuration; only those whose source changed since the committed report are compiled."""
    out = tmp_path_factory.mktemp("aot") / "report"
    return compile_report(out, "--known", str(KNOWN), "--arch", "80", "90", "100", "--jobs", "2")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.timeout(1800)
def test_every_shipped_configuration(
        module: str, full_report: tuple[list[dict], subprocess.CompletedProcess[str]]) -> None:
    """Slow when much changed: ``python benchmarks/kernel_report.py --record`` renews the committed report."""
    rows, done = full_report
    mine = [row for row in rows if row["module"] == module]
    assert {row["arch"] for row in mine} == {80, 90, 100}, done.stderr
    bad = [line for line in done.stdout.splitlines() if line.startswith(f"{module}/") and not line.endswith("  -")]
    assert not bad, "\n".join(bad)


@pytest.mark.skipif(not KNOWN.exists(), reason="benchmarks/kernel_report.py has not written its report")
@pytest.mark.timeout(600)
def test_the_committed_report_is_what_the_compiler_says(tmp_path: Path) -> None:
    """A sample, compiled afresh, whatever the committed report holds."""
    rows, done = compile_report(tmp_path / "report", "--match", "/backward/swin.*_b_w(6|12)$", "--arch", "90")
    assert_clean(rows, done)
    known = {row["key"]: row for row in json.loads(KNOWN.read_text())["rows"]}
    assert all(row == known.get(row["key"], row) | {"case": row["case"]} for row in rows)


BAD = '''
import triton, triton.language as tl
from fastmim_kernels.common.aot_case import AotCase

@triton.jit
def copy(p_x, p_y, n, B: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)

def case(name, divisible, block=1024):
    return AotCase(name, copy, {"p_x": "*bf16", "p_y": "*bf16", "n": "i32"}, {"B": block}, 4, 2, divisible)
'''


def test_the_report_sees_what_it_is_for(tmp_path: Path) -> None:
    """Without divisibility the accesses are scalar; a tile of 64 Ki values needs local memory."""
    (tmp_path / "bad.py").write_text(BAD)
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import bad, json; from fastmim_kernels.check.aot import "
            "compile_case as c; full = ('p_x', 'p_y', 'n'); print(json.dumps([c(bad.case('a', full), 80), "
            "c(bad.case('b', ()), 80), c(bad.case('c', full, 65536), 80)]))")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ROOT / "kernels")], env=environment,
                          capture_output=True, text=True, check=True)
    good, scalar, huge = json.loads(done.stdout.splitlines()[-1])
    assert good["share_128"] == 1 and good["loads"] == {"128": 1} and good["spills"] == 0
    assert scalar["share_128"] == 0 and set(scalar["loads"]) == {"16"}
    assert huge["spills"] > 0 and huge["local_bytes"] > 0
