"""The training step of this checkout beside another one's, in turns: what a change did to the speed, and to the loss.

    python benchmarks/bench_checkout.py OTHER [--model swin_base swinv2_base] [--rounds 7] [--batch 4] [--threads 2]

Each checkout has a process of its own with the same weights, images and masks; one step of the one follows one of the
other. ``ratio`` is this checkout's speed over the other's, round by round. The losses of the steps are printed side by
side, in full: a change that only moves code leaves them equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.append(str(ROOT))  # behind PYTHONPATH, which names the checkout that serves

from benchmarks import command  # noqa: E402


def serve(model: str, batch: int, threads: int) -> None:
    """One training step for each line of standard input; prints its seconds and its loss."""
    import torch

    from fastmim import create_objective
    from fastmim.engine.local import LocalEngine
    from fastmim.engine.optim import param_groups

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder={"name": model, "drop_path_rate": 0.0})
    engine = LocalEngine(objective, torch.optim.AdamW(param_groups(objective, 0.05), lr=1e-4), clip_grad=5.0)
    images = torch.randn(batch, 3, *objective.img_size)
    mask = objective.random_mask(torch.arange(batch))
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = engine(images, mask)["loss"]
        engine.backward(loss)
        engine.step()
        print(time.perf_counter() - began, float(loss.detach()), flush=True)


def compare(other: Path, model: str, args: argparse.Namespace) -> None:
    """Print seconds, ratios and losses of one model."""
    workers = []
    for root in (ROOT, other):
        words = [sys.executable, __file__, str(other), "--serve", "--model", model]
        words += ["--batch", str(args.batch), "--threads", str(args.threads)]
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(words, cwd=root, env=environment, **pipes))  # type: ignore[call-overload]
    for worker in workers:
        assert worker.stdout.readline().strip() == "ready", "a checkout could not build its step"
    rounds: list[list[tuple[float, float]]] = []
    for _ in range(args.warm_up + args.rounds):
        row = []
        for worker in workers:
            worker.stdin.write("step\n")
            worker.stdin.flush()
            seconds, loss = map(float, worker.stdout.readline().split())
            row.append((seconds, loss))
        rounds.append(row)
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    timed = rounds[args.warm_up :]
    ratios = sorted(theirs[0] / ours[0] for ours, theirs in timed)
    ours, theirs = (statistics.median(row[i][0] for row in timed) for i in range(2))
    apart = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in rounds)
    print(f"{model}, batch {args.batch}, {args.threads} threads: {ours:.3f} s here, {theirs:.3f} s there, ratio "
          f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}] over {len(ratios)} rounds; losses of "
          f"{len(rounds)} steps differ by {apart:.1e} at most")


def main() -> int:
    parser = command.Parser("bench_checkout.py", __doc__)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--model", nargs="+", default=["swin_base", "swinv2_base"], help="sizes")
    parser.add_argument("--rounds", type=command.positive, default=7, help="timed steps of each")
    parser.add_argument("--warm-up", type=command.natural, default=3, help="steps of each before them")
    parser.add_argument("--batch", type=command.positive, default=4, help="images a step")
    parser.add_argument("--threads", type=command.positive, default=2, help="CPU threads of torch")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model[0], args.batch, args.threads)
        return 0
    if not (args.other / "fastmim" / "__init__.py").is_file():
        raise ValueError(f"other={args.other}: no checkout of fastmim; give the folder that holds fastmim/")
    for model in args.model:
        compare(args.other.resolve(), model, args)
    return 0


if __name__ == "__main__":
    command.exit_with("bench_checkout.py", main)
