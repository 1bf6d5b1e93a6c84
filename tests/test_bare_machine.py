"""The tests that need a GPU are collected on a machine that has torch, triton and timm, and little else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import sys
from importlib.machinery import PathFinder

ABSENT = ("pydantic", "pydantic_core", "deepspeed", "hypothesis", "pytest_timeout")

class Without:
    find = PathFinder.find_spec

    def __call__(self, name, path=None, target=None):
        absent = name.split(".")[0] in ABSENT or name == "nvidia.dali"
        return None if absent else self.find(name, path, target)

PathFinder.find_spec = Without()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_cuda_tests_are_collected_without_pydantic_deepspeed_and_dali() -> None:
    """What cannot be imported is skipped with its reason, and holds no test for a GPU but those of DALI itself."""
    command = [sys.executable, "-c", BARE, "-m", "cuda", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    here = Path(__file__)
    marked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
              if path != here and "@pytest.mark.cuda" in path.read_text(encoding="utf-8")}
    collected = set(re.findall(r"^(tests/[\w/]+\.py)::", done.stdout, re.MULTILINE))
    assert marked - collected <= {"tests/data/test_dali.py"}
    skipped = dict(re.findall(r"^SKIPPED \[1\] (tests/[\w/]+\.py):1: (.*)$", done.stdout, re.MULTILINE))
    assert skipped["tests/test_config.py"] == "No module named 'pydantic'"
    assert not marked & set(skipped)
