"""What a step costs the host on a GPU: CPU seconds of Python and dispatcher, with every kernel left out.

The encoder's blocks run forward and backward on the path that a CUDA tensor takes, but on tiny CPU tensors; launches
of Triton kernels return at once. What is left is what the processor must do before the GPU has its work: where it
takes longer than the GPU's kernels, they wait for it.

    python benchmarks/bench_host.py [--model swinv2_base] [--repeats 20] [--checkout OTHER]

``--checkout`` measures another checkout of fastmim beside this one, in turns, for the numbers before and after. Other
work on the machine only adds time: the 20 % quantile of many passes says more than their median there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.append(str(ROOT))  # behind PYTHONPATH, which names the checkout that is measured

from benchmarks import command, harness  # noqa: E402

HEADS_OF_ONE = 32
"""Channels per head of the shipped sizes: the kernels' path depends on it."""


@contextmanager
def launches_left_out() -> Iterator[list[int]]:
    """Ops choose as on a GPU, launches do nothing, and the device is an H100 by its properties; yields their number."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched = [0]

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        launched[0] += 1

    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="H100")

    def product(x: Any, weight: Any, *bias_and_more: Any) -> Any:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def matmul(x: Any, y: Any) -> Any:
        # A weight's gradient, of a transposed x, in float32 at once, as on a GPU: on a CPU a cast follows, whose time
        # is not the host's.
        dtype = x.dtype if x.is_contiguous() else torch.float32
        return x.new_empty((*x.shape[:-1], y.shape[-1]), dtype=dtype)

    with ExitStack() as stack:
        # cuBLAS' products cost the host an allocation and a launch; here the allocation is left.
        stack.enter_context(mock.patch.object(torch.nn.functional, "linear", product))
        stack.enter_context(mock.patch.object(torch.ops.mkldnn, "_linear_pointwise", product))
        stack.enter_context(mock.patch.object(torch.Tensor, "__matmul__", matmul))
        for function in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(function, "run", run))
        for name, answer in (("get_device_properties", properties), ("get_device_capability", (9, 0))):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda device=None, answer=answer: answer))
        # Before there was a direct path for CUDA tensors, only those of a CPU went past the dispatcher.
        ours = [module for name, module in list(sys.modules.items()) if name.startswith("fastmim_kernels")]
        for module in (module for module in ours if hasattr(module, "CAST")):
            stack.enter_context(mock.patch.object(module, "CAST", sys.maxsize))
        for module in ours if not any(hasattr(module, "PASSES") for module in ours) else []:
            if hasattr(module, "unwatched"):
                stack.enter_context(mock.patch.object(module, "unwatched", lambda args: False))
        yield launched


def tiny(name: str) -> dict[str, Any]:
    """Keyword arguments of an encoder as deep as ``name``, on one small image and with one head a stage's worth."""
    from fastmim.models import expand_size

    size = expand_size({"name": name})
    heads = [2**i for i in range(len(size["depths"]))]
    return size | {"embed_dim": HEADS_OF_ONE, "num_heads": tuple(heads), "img_size": 8 * 12}


def serve(model: str, repeats: int) -> None:
    """For each line of standard input, one of JSON: CPU seconds of forward and of backward of ``repeats`` passes."""
    import torch

    from fastmim.models import create_encoder

    ours = {name: module for name, module in sys.modules.items() if name.startswith("fastmim_kernels")}
    dispatch = next(module for name, module in ours.items() if name.endswith("dispatch"))
    torch.set_num_threads(1)
    encoder = create_encoder(tiny(model)).train()
    images = torch.rand(1, 3, *encoder.img_size)
    mask = torch.rand(1, *encoder.grid) < 0.6
    with dispatch.as_on_a_gpu(), launches_left_out() as launched, torch.autocast("cpu", torch.bfloat16):
        for _ in sys.stdin:
            rows = []
            for _ in range(repeats):
                began, launched[0] = time.process_time(), 0
                out = encoder(images, mask)
                between = time.process_time()
                out.backward(torch.zeros_like(out))
                rows.append((between - began, time.process_time() - between, launched[0]))
                encoder.zero_grad(set_to_none=True)
            print(json.dumps(rows), flush=True)


class Worker:
    """A process that serves one checkout."""

    def __init__(self, root: Path, model: str, repeats: int) -> None:
        words = [sys.executable, __file__, "--serve", "--model", model, "--repeats", str(repeats)]
        environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1"}
        self.root = root
        self.process = subprocess.Popen(words, env=environment, cwd=root, stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def passes(self) -> list[list[float]]:
        """[seconds forward, seconds backward, launches] of each pass of a round."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
            found: list[list[float]] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            status = self.process.wait()
            raise RuntimeError(f"{self.root.name}: exit status {status}: {self._said()[-400:]}") from error
        return found

    def _said(self) -> str:
        return self.process.stderr.read() if self.process.stderr else ""

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """The 20 % quantile and the median, in milliseconds."""
    ordered = sorted(seconds)
    return 1e3 * ordered[len(ordered) // 5], 1e3 * statistics.median(ordered)


def measure(workers: list[Worker], rounds: int) -> list[list[list[float]]]:
    """The passes of every worker, which take turns; a first round warms up."""
    found: list[list[list[float]]] = [[] for _ in workers]
    for i in range(rounds + 1):
        for worker, passes in zip(workers, found, strict=True):
            new = worker.passes()
            passes += new if i else []
    for worker in workers:
        worker.end()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser("bench_host.py", __doc__)
    parser.add_argument("--model", default="swinv2_base", help="size")
    parser.add_argument("--repeats", type=command.positive, default=5, help="passes of a round")
    parser.add_argument("--rounds", type=command.positive, default=20, help="rounds of each checkout")
    parser.add_argument("--checkout", type=Path, metavar="DIR",
                        help="another checkout, measured in turns with this one (default: none)")  # fmt: skip
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_results("host.csv")
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.model, args.repeats)
        return 0
    if args.checkout and not (args.checkout / "fastmim" / "__init__.py").is_file():
        raise ValueError(f"--checkout {args.checkout}: no checkout of fastmim; give the folder that holds fastmim/")
    checkouts = [ROOT] + ([args.checkout.resolve()] if args.checkout else [])
    found = measure([Worker(root, args.model, args.repeats) for root in checkouts], args.rounds)
    rows = [summary(root, args.model, passes) for root, passes in zip(checkouts, found, strict=True)]
    for root, row in zip(checkouts, rows, strict=True):
        print(f"{root.name}: {row['note']} ({args.model}, 20 % quantiles of {row['rounds']} passes)")
    if args.checkout:
        ours, theirs = rows
        for row in rows:
            row |= {"baseline": theirs["provider"]}
            row["ratio"] = f"{float(theirs['seconds_p20']) / float(row['seconds_p20']):.3f}"
        low, middle = (float(ours[name]) / float(theirs[name]) for name in ("seconds_p20", "seconds"))
        print(f"{low:.3f} of {checkouts[1].name}'s time (by medians {middle:.3f})")
    harness.append_rows(args.out, rows)
    return 0


def summary(root: Path, model: str, passes: list[list[float]]) -> dict[str, Any]:
    """A row of the CSV: CPU seconds of forward and backward together, median and 20 % quantile."""
    low, middle = quantiles([forward + backward for forward, backward, _ in passes])
    (f_low, _), (b_low, _) = (quantiles([one[i] for one in passes]) for i in range(2))
    return {
        **harness.environment(),
        "benchmark": "host", "case": f"blocks of {model}, every kernel left out", "device": "cpu",
        "provider": f"fastmim at {harness.commit_of(root)}", "seconds": f"{middle / 1e3:.5f}",
        "seconds_p20": f"{low / 1e3:.5f}", "rounds": len(passes), "launches": f"{passes[0][2]:.0f}",
        "note": f"CPU time of forward {f_low:.1f} ms, backward {b_low:.1f} ms, both {low:.1f} ms, median "
                f"{middle:.1f} ms; {passes[0][2]:.0f} Triton launches",
    }  # fmt: skip


if __name__ == "__main__":
    command.exit_with("bench_host.py", main)
