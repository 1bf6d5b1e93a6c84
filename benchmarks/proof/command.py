"""Proves and measures the Triton kernels on this GPU, part by part.

Finished parts are kept in the folder and skipped as long as sources, machine and libraries stay the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command
from benchmarks.proof import page, store
from benchmarks.proof.part import Part
from benchmarks.proof.process import Worker
from benchmarks.proof.registry import PARTS
from benchmarks.proof.store import Result

BUDGET = 530
"""Seconds: some less than the nine minutes, for the report and for ending a part."""


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run what is not finished yet; 0, or 1 where a part has failed.

    Raises:
        ValueError: There is no GPU, and not only what can be run without one is asked for.
    """
    args = _parser(parts).parse_args(argv)
    wanted = [part for part in parts if part.name in args.parts]
    args.out.mkdir(parents=True, exist_ok=True)
    with Worker(args.out, dry=args.dry, reference=args.reference) as worker:
        machine = worker.machine()
        if not args.dry and machine["device"] != "cuda":
            raise ValueError("torch sees no CUDA GPU here; use --dry for what can be run without one")
        key = store.key(machine, args.dry)
        left = _run(wanted, parts, worker, key, machine, args)
    results = store.read(args.out, parts)
    page.write(args.out, parts, results, key)
    return _verdict(wanted, {name: result for name, result in results.items() if result.key == key}, left, args)


def _parser(parts: Sequence[Part]) -> argparse.ArgumentParser:
    names = [part.name for part in parts]

    def of_parts(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]}: no such part; use some of {','.join(names)}")
        return text.split(",")

    parser = command.Parser("gpu_proof.py", __doc__)
    parser.add_argument("--out", type=command.result_folder, default=Path("proof"), metavar="DIR",
                        help="folder of results, report, CSV and log")  # fmt: skip
    parser.add_argument("--parts", type=of_parts, default=names, metavar="PART,…",
                        help=f"comma-separated (default: {','.join(names)})")  # fmt: skip
    parser.add_argument("--budget", type=command.natural, metavar="SECONDS",
                        help=f"begin no part that does not fit; 0: no end (default: {BUDGET} on a GPU, 0 with --dry)")
    parser.add_argument("--commit", help="short commit for the CSV rows, where the checkout has no .git")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="clone of flash-window-attention-v2, for rivals")
    parser.add_argument("--again", action="store_true", help="also run the parts that are finished")
    parser.add_argument("--dry", action="store_true", help="without a GPU: tiny shapes, fake tensors, the interpreter")
    return parser


def _run(wanted: Sequence[Part], parts: Sequence[Part], worker: Worker, key: str, machine: dict[str, str],
         args: argparse.Namespace) -> list[str]:
    """Run the parts that fit and are not finished; the names of those that are left."""
    budget = args.budget if args.budget is not None else 0 if args.dry else BUDGET
    began, left = time.monotonic(), []
    before = store.read(args.out, wanted)
    for part in wanted:
        done = part.name in before and store.finished(before[part.name], part, key, args.reference)
        if done and not args.again:
            worker.say(f"== {part.name}: finished before, skipped")
            continue
        remaining = budget - (time.monotonic() - began) if budget else None
        if remaining is not None and remaining < part.seconds:
            left.append(part.name)
            continue
        worker.say(f"== {part.name}: {part.title}")
        result = worker.run(part, remaining)
        result = store.complete(result, key, machine, args.commit, args.reference)
        store.write(args.out, result)
        # Each time: whoever ends the command after some minutes has the pages of those.
        page.write(args.out, parts, store.read(args.out, parts), key)
        worker.say(f"== {part.name}: {'passed' if result.passed else f'FAILED: {result.reason}'} "
                   f"({result.seconds:.0f} s)")  # fmt: skip
    return left


def _verdict(wanted: Sequence[Part], results: dict[str, Result], left: list[str], args: argparse.Namespace) -> int:
    for part in wanted:
        for line in results[part.name].left_out if part.name in results else []:
            print(f"   {part.name} left out: {line}")
    failed = [part.name for part in wanted if part.name in results and not results[part.name].passed]
    if left:
        print(f"left for the next run (the budget is spent): {','.join(left)}; run the same command again")
    if failed:
        print(f"FAILED: {','.join(failed)}")
    print(f"report: {args.out / page.REPORT}")
    return int(bool(failed))
