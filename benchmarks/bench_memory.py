"""Peak memory of a training step: every provider in a process of its own, so that no other one is in its peak.

On a CPU the peak counts resident pages (weights, gradients, moments, activations, libraries), on a GPU it is the
CUDA allocator's, with NVML's reading beside it. Saved bytes are what autograd keeps between forward and backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import bench_compare, harness, measure, providers  # noqa: E402
from benchmarks.providers import Case  # noqa: E402


def measure_here(name: str, case: Case, reference: str | None, steps: int) -> dict[str, Any]:
    """CSV columns of one provider, measured in this process, which should have done nothing else.

    Raises:
        Unavailable: the provider cannot be built.
    """
    source = case.weights()
    images, mask = case.inputs(source)
    step = providers.build(name, case, source, reference=reference)
    del source
    gc.collect()
    measure.return_freed_memory()
    measure.reset_peak_memory(case.device)
    start = measure.resident() if case.device == "cpu" else torch.cuda.memory_allocated()
    losses = [float(measure.run_step(step, images, mask, measure.HostClock())[1]) for _ in range(steps)]
    columns = {"start_memory_gib": f"{start / measure.GIB:.3f}", **measure.peak_memory(case.device)}
    if not name.endswith(providers.COMPILED):
        # What a compiled graph keeps does not pass through the hooks.
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16"):
            kept = harness.saved_bytes(step.module, images, mask)
        columns["saved_mb_per_image"] = f"{kept / case.batch / 1e6:.1f}"
    return columns | {"loss": f"{losses[0]:.6f}"}


def measure_apart(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any] | str:
    """The same in a new process, or why there is no result."""
    spec = dict(name=name, case=dataclasses.asdict(case), reference=args.reference, steps=args.steps,
                threads=args.threads)  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(spec)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(spec: dict[str, Any]) -> int:
    """The new process."""
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    case = Case(**spec["case"] | {"overrides": tuple((k, v) for k, v in spec["case"]["overrides"])})
    try:
        print(json.dumps(measure_here(spec["name"], case, spec["reference"], spec["steps"])))
    except providers.Unavailable as reason:
        print(reason, file=sys.stderr)
        return 3
    return 0


def measure_case(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CSV rows of one case; a provider whose first loss is not the first one's is left out."""
    shared = {"benchmark": "memory", "rounds": args.steps,
              **bench_compare.describe(case, case.weights(), 1, args)}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in args.providers:
        columns = measure_apart(name, case, args)
        if isinstance(columns, str):
            print(f"  not measured: {columns}", file=sys.stderr)
            continue
        rows.append(shared | columns | {"provider": name})
        right, tolerance = float(rows[0]["loss"]), measure.TOLERANCE[case.dtype][0]
        if not abs(float(columns["loss"]) - right) <= tolerance * right:
            print(f"  REFUSED {name}: loss {columns['loss']} is not {right}; not reported", file=sys.stderr)
            rows.pop()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py memory", description=__doc__)
    bench_compare.add_shared(parser)
    parser.add_argument("--steps", type=int, default=3, help="the moments of AdamW exist from the first update on")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child)
    for case in bench_compare.cases(args):
        rows = measure_case(case, args)
        harness.append_rows(args.out, rows)
        for row in rows:
            print(
                f"{row['case']:15} {row['dtype']} b{row['batch']} {row['provider']:22}"
                f" peak {row['peak_memory_gib']} GiB ({row['memory_kind']}; {row['start_memory_gib']} before a step)"
                f"  saved {row.get('saved_mb_per_image', '-')} MB/image",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
