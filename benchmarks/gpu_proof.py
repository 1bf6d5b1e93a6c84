"""Whether the Triton kernels are right on this GPU, and how fast they are: one command, one folder with a report.

    python benchmarks/gpu_proof.py [--out proof] [--parts ops,losses] [--budget SECONDS] [--dry]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command  # noqa: E402


def main() -> int:
    from benchmarks.proof.command import main  # a missing package is one line too

    return main()


if __name__ == "__main__":
    command.exit_with("gpu_proof.py", main)
