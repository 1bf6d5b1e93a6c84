"""Whether the Triton kernels are right on this GPU, and how fast they are: one command, one folder with a report.

    python benchmarks/gpu_proof.py [--out proof] [--parts ops,losses] [--budget SECONDS] [--dry]

Finished parts are kept in the folder and skipped as long as sources, machine and libraries stay the same. See
benchmarks/README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.proof.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
