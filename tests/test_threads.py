"""What the command settles about threads before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmim.threads import SPINS, cgroup_quota, thread_settings

ROOT = Path(__file__).resolve().parents[1]
ALL = os.cpu_count() or 1
SLEEPS = {"GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize(("env", "allowed", "quota", "expected"), [
    ({}, ALL, None, SLEEPS),
    ({"OMP_WAIT_POLICY": "active"}, ALL, None, {}),
    ({"GOMP_SPINCOUNT": "7"}, ALL, None, {}),
    ({}, 64, 2.5, SLEEPS | {"OMP_NUM_THREADS": "2"}),
    ({}, 64, 0.5, SLEEPS | {"OMP_NUM_THREADS": "1"}),
    ({}, 64, 100.0, SLEEPS),
    ({"OMP_NUM_THREADS": "8"}, 64, 2.0, SLEEPS),
    ({"MKL_NUM_THREADS": "8"}, 64, 2.0, SLEEPS),
    ({"LOCAL_WORLD_SIZE": str(ALL)}, ALL, None, SLEEPS | ({"OMP_NUM_THREADS": "1"} if ALL > 1 else {})),
    # A launcher that binds its ranks to cores has divided them already.
    ({"LOCAL_WORLD_SIZE": "4"}, ALL + 8, None, SLEEPS),
])  # fmt: skip
def test_only_what_nobody_has_set(env, allowed, quota, expected):
    assert thread_settings(env, allowed=allowed, quota=quota) == expected


def test_the_quota_of_control_groups(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    (tmp_path / "slice" / "job").mkdir(parents=True)
    assert cgroup_quota(tmp_path, own) is None
    (tmp_path / "slice" / "job" / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path, own) is None
    (tmp_path / "slice" / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(tmp_path, own) == 1.5
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cgroup_quota(tmp_path, tmp_path / "none") == 0.5


def test_only_the_command_changes_the_environment():
    code = """
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None), os.environ.pop("GOMP_SPINCOUNT", None), os.environ.pop("KMP_BLOCKTIME", None)
before = dict(os.environ)
import fastmim, fastmim.cli
assert dict(os.environ) == before
fastmim.cli.main = lambda: print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
fastmim.cli.entry()
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said == f"False {SPINS}\n"
