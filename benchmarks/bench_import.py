"""Wall clock of ``import fastmim`` beside the imports it is often taken for, each in fresh interpreters.

python benchmarks/bench_import.py [--rounds 7] [--out CSV]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness  # noqa: E402

STATEMENTS = {
    "interpreter alone": "pass",
    "import fastmim": "import fastmim",
    "from fastmim import create_objective": "from fastmim import create_objective",
    "import torch": "import torch",
    "import timm": "import timm",
}


def in_fresh_interpreter(statement: str) -> Callable[[], None]:
    """A function that runs a statement in a new process, from the checkout."""
    paths = [str(harness.ROOT), str(harness.ROOT / "kernels")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{statement}"
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) and None


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py import", __doc__)
    parser.add_argument("--rounds", type=command.positive, default=7, help="timed starts of each")
    parser.add_results("measurements.csv")
    args = parser.parse_args(argv)
    steps = {name: in_fresh_interpreter(statement) for name, statement in STATEMENTS.items()}
    timings = harness.interleave(steps, rounds=args.rounds)
    shared = {"benchmark": "import", "rounds": args.rounds, "baseline": "import timm", **harness.environment()}
    rows = []
    for name, timing in timings.items():
        seconds, low, high = timing.quantiles()
        ratio = harness.speedup(timings["import timm"], timing)
        print(f"{name:40} {seconds:.3f} s [{low:.3f}, {high:.3f}]  {ratio[0]:.2f}x faster than import timm")
        rows.append(shared | {
            "case": name, "provider": "python", "seconds": f"{seconds:.4f}", "seconds_p20": f"{low:.4f}",
            "seconds_p80": f"{high:.4f}", "ratio": f"{ratio[0]:.3f}", "ratio_p20": f"{ratio[1]:.3f}",
            "ratio_p80": f"{ratio[2]:.3f}",
        })  # fmt: skip
    harness.append_rows(args.out, rows)
    return 0


if __name__ == "__main__":
    command.exit_with("run.py import", main)
