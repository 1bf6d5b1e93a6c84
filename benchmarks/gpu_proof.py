"""Whether the Triton kernels are right on this GPU, and how fast they are: one command, one folder with a report.

    python benchmarks/gpu_proof.py [--out proof] [--parts ops,losses] [--budget SECONDS] [--dry]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = OWN
# The server of the parts' processes imports before it is told of sys.path (CPython before 3.12.4): it would take, and
# prove, another fastmim that is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([*OWN, *filter(None, [os.environ.get("PYTHONPATH")])])

from benchmarks import command  # noqa: E402


def main() -> int:
    from benchmarks.proof.command import main  # a missing package is one line too

    return main()


if __name__ == "__main__":
    command.exit_with("gpu_proof.py", main)
