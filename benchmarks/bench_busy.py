"""What the waiting of OpenMP's threads costs on a quiet and on a busy machine: demo-size training steps in turns.

    python benchmarks/bench_busy.py [--policies default passive chosen 1000] [--rounds 9] [--neighbours 2]

Every policy has a process of its own (OpenMP reads its environment once), and they take turns of a few steps of
configs/demo.yaml with data workers; those whose turn it is not sleep. ``quiet`` is the machine as it is, ``busy`` the
same beside processes that count in a loop, one a ``--neighbours``. A ratio is the time of ``default`` in the same round
over that of the policy: above 1 is faster. ``chosen`` is what the fastmim command sets, a number the turns of
GOMP_SPINCOUNT, ``passive`` and ``active`` are OMP_WAIT_POLICY, ``+threads=N`` behind one of them OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command  # noqa: E402

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def policy_settings(policy: str) -> dict[str, str]:
    """The environment that a policy means.

    Raises:
        ValueError: it is none.
    """
    waiting, plus, threads = policy.partition("+threads=")
    if plus and not threads.isdecimal():
        raise ValueError(f"{policy!r}: no number of threads")
    found = {"OMP_NUM_THREADS": threads} if plus else {}
    if waiting in ("passive", "active"):
        return found | {"OMP_WAIT_POLICY": waiting}
    if waiting.isdecimal():
        return found | {"GOMP_SPINCOUNT": waiting}
    if waiting == "chosen":
        from fastmim.threads import SPINS

        return found | {"GOMP_SPINCOUNT": SPINS}
    if waiting != "default":
        raise ValueError(f"{policy!r}: use default, passive, active, chosen or a number of spins")
    return found


class Trainer:
    """A process that takes some training steps each time it is asked to, and says how long they took."""

    def __init__(self, policy: str, images: Path, steps: int) -> None:
        line = [sys.executable, __file__, "--child", str(images), policy, "--steps", str(steps)]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self) -> tuple[float, float]:
        """(seconds a step, CPU seconds a step of the process without its data workers).

        Raises:
            RuntimeError: the process has ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write("\n")
            stdin.flush()
            wall, cpu = map(float, stdout.readline().split())
        except (OSError, ValueError):
            raise RuntimeError("a trainer has ended; what it said is above") from None
        return wall, cpu

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def child(images: str, policy: str, steps: int) -> int:
    """Train whenever a line comes."""
    # Here, and not in the environment that it starts with: a site's sitecustomize may settle these too.
    for name in SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(policy_settings(policy))
    from fastmim.config import load_config
    from fastmim.engine import distributed
    from fastmim.engine.build import build
    from fastmim.engine.loop import train_step
    from fastmim.engine.stream import stream

    overrides = [f"data.path={images}", "data.val_path=null", "train.steps=1000000", "train.micro_batch_size=8"]
    cfg = load_config(str(ROOT / "configs" / "demo.yaml"), overrides)
    with distributed.distributed() as world, ExitStack() as stack:
        parts = build(cfg, world, stack)
        batches = stream(parts.loader, start=0, stop=1_000_000, grad_accum_steps=1)
        for _ in sys.stdin:
            began, used = time.perf_counter(), time.process_time()
            for _ in range(steps):
                lengths = {"total": 1_000_000, "steps_per_epoch": parts.loader.steps_per_epoch}
                train_step(parts.engine, batches, lr=1e-4, seed=0, **lengths)
            print((time.perf_counter() - began) / steps, (time.process_time() - used) / steps, flush=True)
    return 0


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that do nothing but count."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(trainers: dict[str, Trainer], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The turns of every policy, a round after the other, in alternating order; the first of each is not kept."""
    turns: dict[str, list[tuple[float, float]]] = {policy: [] for policy in trainers}
    for i in range(-1, rounds):
        for policy in list(trainers) if i % 2 else reversed(list(trainers)):
            found = trainers[policy].turn()
            if i >= 0:
                turns[policy].append(found)
    return turns


def report(machine: str, turns: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    """Print and write the rows of a quiet or a busy machine."""
    from benchmarks import harness

    rows = []
    first = harness.Timing(tuple(wall for wall, _ in turns["default"]))
    for policy, found in turns.items():
        timing = harness.Timing(tuple(wall for wall, _ in found))
        numbers = [*timing.quantiles(), *harness.speedup(first, timing)]
        keys = ("seconds", "seconds_p20", "seconds_p80", "ratio", "ratio_p20", "ratio_p80")
        row = {key: f"{value:.4g}" for key, value in zip(keys, numbers, strict=True)}
        cpu = sorted(used for _, used in found)[len(found) // 2]
        beside = f"{args.neighbours} neighbours" if machine == "busy" else "no neighbours"
        rows.append({"benchmark": "busy", "case": f"configs/demo.yaml, {machine}", "device": "cpu", "dtype": "fp32",
                     "batch": 8, "provider": policy, "baseline": "default", "rounds": args.rounds,
                     "note": f"{beside}, {cpu:.4g} CPU seconds a step", **row, **harness.environment()})  # fmt: skip
        print(f"{machine:5}  {policy:20} {row['seconds']:>7} s a step  {row['ratio']:>6}x "
              f"[{row['ratio_p20']}, {row['ratio_p80']}]  {cpu:.4g} CPU s")  # fmt: skip
    harness.append_rows(args.out, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("bench_busy.py", __doc__)
    policies = ["default", "passive", "chosen", "1000", "10000", "100000"]
    parser.add_argument("--policies", nargs="+", type=command.checked(policy_settings), default=policies,
                        metavar="POLICY", help="ways to wait; default is always there")  # fmt: skip
    for name, default, text in (("rounds", 9, "timed rounds"), ("steps", 5, "steps a turn"),
                                ("neighbours", 2, "processes beside a busy run")):  # fmt: skip
        parser.add_argument(f"--{name}", type=command.positive, default=default, help=text)
    parser.add_argument("--machines", nargs="+", choices=("quiet", "busy"), default=["quiet", "busy"],
                        help="which of the two")  # fmt: skip
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_results("busy.csv")
    args = parser.parse_args(argv)
    if args.child is not None:
        return child(*args.child, args.steps)
    from fastmim.data import make_demo

    with tempfile.TemporaryDirectory() as folder:
        make_demo(folder)
        trainers = {policy: Trainer(policy, Path(folder) / "train", args.steps)
                    for policy in dict.fromkeys(["default", *args.policies])}  # fmt: skip
        try:
            for machine in args.machines:
                with neighbours(args.neighbours if machine == "busy" else 0):
                    report(machine, measure(trainers, args.rounds), args)
        finally:
            for trainer in trainers.values():
                trainer.close()
    return 0


if __name__ == "__main__":
    command.exit_with("bench_busy.py", main)
