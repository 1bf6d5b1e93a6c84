"""A whole training step of every provider, in turns, on the same weights, images and masks: SimMIM's, iBOT's or MAE's.

A step is forward, backward, clipping at 5.0 and AdamW; iBOT's and MAE's their recipes'. A provider whose
loss is not the judge's (the published code's where it is there, else timm's) is refused: it is not timed, and the exit
status is 1. ``ratio`` is a provider's speed over the baseline's, round by round.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness, measure, options, providers  # noqa: E402
from benchmarks.options import describe  # noqa: E402
from benchmarks.providers import Case  # noqa: E402
from benchmarks.seat import Caller, take_seats  # noqa: E402
from fastmim.engine.distributed import World, distributed  # noqa: E402

JUDGES = ("microsoft-swin", "microsoft-simmim", "timm", "bytedance-ibot", "facebookresearch-mae")


def measure_case(
    case: Case, args: argparse.Namespace, world: World | None = None, *, apart: bool = True
) -> tuple[list[dict[str, Any]], int]:
    """CSV rows of one case, and how many providers were refused. ``apart``: a process for each."""
    group = None if apart else world
    seats, losses, reasons = take_seats(
        args.providers, case, args.reference, args.threads, apart=apart, world=group, clock=args.clock
    )
    quiet = world is not None and not world.is_main
    for reason in [] if quiet else reasons:
        print(f"  not measured: {reason}", file=sys.stderr)
    if args.baseline not in seats:
        raise ValueError(f"--baseline {args.baseline}: it is not among the providers of {case.name}")
    wrong = refused(losses, case, args.baseline, quiet)
    if args.baseline in wrong:
        return [], len(wrong)
    kept = {name: seat for name, seat in seats.items() if name not in wrong}
    steps = {name: functools.partial(seat.call, "step") for name, seat in kept.items()}
    measure.interleave(steps, args.warm_up)
    phases = measure.interleave(steps, args.rounds)
    ranks = world.size if world else 1
    shared = {"benchmark": "step", "baseline": args.baseline, "rounds": args.rounds,
              "note": "CPU seconds" if args.clock == "cpu" else "", **describe(case, ranks, args)}  # fmt: skip
    rows = []
    for name, seat in kept.items():
        columns = measure.speed_columns(phases[name], case.batch * ranks, phases[args.baseline])
        columns |= gpu_columns(seat, case, float(columns["images_per_sec"]) / ranks)
        rows.append(shared | columns | {"provider": name, "loss": f"{losses[name][0]:.6f}"})
    for seat in seats.values():
        seat.close()
    return rows, len(wrong)


def refused(losses: dict[str, tuple[float, float]], case: Case, baseline: str, quiet: bool = False) -> dict[str, str]:
    """Provider → why it is not reported; the judge is the first of :data:`JUDGES` that is there, else ``baseline``."""
    judge = next((name for name in JUDGES if name in losses), baseline)
    found = measure.refusals(losses, judge, measure.TOLERANCE[case.dtype]) if losses else {}
    for name, why in {} if quiet else found.items():
        print(f"  REFUSED {name}: {why}; not reported", file=sys.stderr)
    return found


def gpu_columns(seat: Caller, case: Case, images_per_sec: float) -> dict[str, str]:
    """Shares of the peak and of the modelled roofline, and energy, where there is a GPU."""
    if case.device != "cuda":
        return {}
    from benchmarks.bench_counts import model_gflop, modelled_seconds

    name = torch.cuda.get_device_name()
    gflop = model_gflop(case)
    out = {"gflop_per_image": f"{gflop:.2f}"}
    if case.dtype == "bf16":
        share = measure.mfu(gflop, images_per_sec, name)
        modelled = modelled_seconds(case, name)
        out |= {} if share is None else {"mfu": f"{share:.4f}"}
        out |= {} if modelled is None else {"roofline_share": f"{modelled * images_per_sec:.4f}"}
    try:
        out["joules_per_image"] = f"{seat.call('energy'):.3f}"
    except Exception as error:  # no driver, no permission, or a card without the counter
        print(f"  energy not measured: {error}", file=sys.stderr)
    return out


def show(row: dict[str, Any]) -> None:
    """One line of a row."""
    print(
        f"{row['case']:15} {row['dtype']} b{row['batch']} {row['img_size']}px x{row['ranks']} {row['provider']:22}"
        f" {row['images_per_sec']:>8} img/s [{row['images_per_sec_p20']}, {row['images_per_sec_p80']}]"
        f"  fwd {row['forward_s']} bwd {row['backward_s']} opt {row['optimizer_s']} s"
        f"  {row['ratio']}x {row['baseline']} [{row['ratio_p20']}, {row['ratio_p80']}]"
        f"  {row['note']}",
        flush=True,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser("run.py step", __doc__)
    options.add_shared(parser)
    parser.add_argument("--baseline", type=command.checked(providers.check_name), default="fastmim",
                        help="provider that ratios are against")  # fmt: skip
    parser.add_argument("--rounds", type=command.positive, default=7, help="timed steps of each provider")
    parser.add_argument("--warm-up", type=command.natural, default=5,
                        help="steps of each before them, beside the loss check's")  # fmt: skip
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: CPU seconds, of a busy machine")
    parser.add_argument("--ranks", type=command.positive, nargs="+", default=[1], help="processes, data-parallel")
    args = parser.parse_args(argv)
    if args.baseline not in args.providers:
        args.providers.append(args.baseline)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1 and args.ranks != [1]:
        return max(launch(ranks, args.threads, argv) for ranks in args.ranks)
    if args.threads:
        torch.set_num_threads(args.threads)  # what the rows say
    wrong = 0
    with distributed() as world:
        for case in options.cases(args):
            rows, count = measure_case(case, args, world, apart=world.size == 1)
            wrong += count
            if world.is_main:
                harness.append_rows(args.out, rows)
                for row in rows:
                    show(row)
    return int(wrong > 0)


def launch(ranks: int, threads: int | None, argv: Sequence[str] | None) -> int:
    """This command again as ``ranks`` data-parallel processes, which share the ``threads`` of the machine."""
    own = [*(sys.argv[1:] if argv is None else argv), "--ranks", "1"]  # of two, the last counts
    own += ["--threads", str(max(1, threads // ranks))] if threads else []
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*command, __file__, *own], check=False).returncode


if __name__ == "__main__":
    command.exit_with("run.py step", main)
