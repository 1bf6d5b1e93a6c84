"""Everything that can be measured, from one entry:

    python benchmarks/run.py {kernels,rivals,step,data,profile,memory,pretrain,target,counts,import,report,all} [opts]

``all`` runs them one after the other with ``--reference``, ``--threads`` and ``--quick`` and draws the report.
Options of a benchmark are shown by ``run.py NAME --help``. Nothing is written into the committed results without
``--record``. How long each takes with its defaults on two cores, estimated:

"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from benchmarks import command  # noqa: E402

NEEDED = ("torch", "torchvision", "timm", "yaml", "pydantic", "safetensors")
MODULES = {
    "kernels": "bench_kernels",
    "rivals": "bench_rivals",
    "step": "bench_compare",
    "data": "bench_data",
    "profile": "bench_profile",
    "memory": "bench_memory",
    "pretrain": "bench_pretrain",
    "target": "bench_target",
    "counts": "bench_counts",
    "import": "bench_import",
    "report": "report",
}
CSV = "measurements.csv"
COMPARED = ("step", "profile", "memory", "pretrain", "counts")  # take --reference
# What `all` runs after a benchmark: over batch, image size, model size and ranks, for the report's scaling.
_TWO = ["--dtypes", "bf16", "--providers", "fastmim", "timm", "--rounds", "3"]
SCALING = {
    "step": [
        ["--cases", "swin_base", "--batch", "1", "2", "8", "16", *_TWO],
        ["--cases", "swin_base", "--img-size", "256", *_TWO],
        ["--cases", "swinv2_small", "swin_large", "swinv2_large", *_TWO],
        ["--cases", "swin_base", "--ranks", "2", *_TWO],
    ],
    "memory": [["--cases", "swin_base", "swinv2_base+47", "--dtypes", "bf16", "--batch", "32"]],
}
QUICK = {
    "kernels": ["--sizes", "swinv2_base", "--rounds", "3"],
    "rivals": ["--sizes", "swinv2_base", "--rounds", "3"],
    "data": ["--images", "256", "--rounds", "1"],
    "target": ["--rounds", "1"],
    "step": ["--rounds", "3", "--dtypes", "bf16", "--cases", "swin_base"],
    "profile": ["--dtypes", "bf16", "--cases", "swin_base"],
    "memory": ["--dtypes", "bf16", "--cases", "swin_base"],
    "pretrain": ["--steps", "20", "--dtypes", "bf16", "--cases", "swin_base"],
    "counts": ["--cases", "swin_base"],
}


def run(name: str, argv: Sequence[str]) -> int:
    """One benchmark in a process of its own, so that none inherits another's memory or threads; its exit status."""
    missing = command.absent(NEEDED)
    if missing:
        print(f"run.py {name}: no module {missing[0]!r}; pip install -e . in the checkout", file=sys.stderr)
        return 2
    words = [sys.executable, str(HERE / f"{MODULES[name]}.py"), *argv]
    return subprocess.run(words, check=False, env=_env()).returncode


def _env() -> dict[str, str]:
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def arguments(name: str, args: argparse.Namespace) -> list[str]:
    """What ``all`` gives to one benchmark."""
    out = list(QUICK.get(name, [])) if args.quick else []
    if name in COMPARED:
        out += ["--reference", args.reference] if args.reference else []
        out += ["--threads", str(args.threads)] if args.threads else []
    if args.out == command.RESULTS / CSV:
        return [*out, "--record"]
    own = ["--csv", str(args.out), "--out", str(args.out.with_name("report.html"))]
    return out + (own if name == "report" else ["--out", str(args.out)])


def run_all(argv: Sequence[str]) -> int:
    """Every benchmark, then the report; a failure of one does not stop the others."""
    parser = command.Parser("run.py all", "Every benchmark, then the report.")
    parser.add_argument("--reference", metavar="DIR", help="clone(s) of microsoft/SimMIM and Swin-Transformer")
    parser.add_argument("--threads", type=command.positive, help="CPU threads of torch (default: its own)")
    parser.add_argument("--quick", action="store_true", help="one model in bf16, few rounds")
    parser.add_results(CSV, "CSV that rows are appended to; report.html goes beside it")
    args = parser.parse_args(argv)
    status = 0
    for name in MODULES:
        print(f"== {name}", flush=True)
        own = arguments(name, args)
        for more in [[], *([] if args.quick else SCALING.get(name, []))]:
            status |= int(run(name, [*own, *more]) != 0)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    own = list(sys.argv[1:] if argv is None else argv)
    if not own or own[0] not in (*MODULES, "all"):
        if own[:1] in (["-h"], ["--help"], []):
            lines = (f"    {name:10} {command.TAKES[f'run.py {name}']}" for name in (*MODULES, "all"))
            print(__doc__ + "\n".join(lines))
            return 0 if own else 2
        print(f"run.py: no benchmark {own[0]!r}; use one of {', '.join((*MODULES, 'all'))}", file=sys.stderr)
        return 2
    return run_all(own[1:]) if own[0] == "all" else run(own[0], own[1:])


if __name__ == "__main__":
    command.exit_with("run.py", main)
