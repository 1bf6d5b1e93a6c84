"""What a step costs the host on a GPU: CPU seconds of Python and dispatcher, with every kernel left out.

The encoder's blocks run forward and backward on the path that a CUDA tensor takes, but on tiny CPU tensors; launches
of Triton kernels return at once. What is left is what the processor must do before the GPU has its work: where it
takes longer than the GPU's kernels, they wait for it.

    python benchmarks/bench_host.py [--model swinv2_base] [--repeats 20] [--checkout OTHER]

``--checkout`` measures another checkout of fastmim beside this one, in turns, for the numbers before and after.
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

from benchmarks import command  # noqa: E402

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


def measure(model: str, repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time of one forward and of one backward, medians."""
    import torch

    from fastmim.models import create_encoder

    ours = {name: module for name, module in sys.modules.items() if name.startswith("fastmim_kernels")}
    dispatch = next(module for name, module in ours.items() if name.endswith("dispatch"))
    torch.set_num_threads(1)
    encoder = create_encoder(tiny(model)).train()
    images = torch.rand(1, 3, *encoder.img_size)
    mask = torch.rand(1, *encoder.grid) < 0.6
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    with dispatch.as_on_a_gpu(), launches_left_out() as launched, torch.autocast("cpu", torch.bfloat16):
        for repeat in range(repeats + 3):
            began, launched[0] = time.process_time(), 0
            out = encoder(images, mask)
            between = time.process_time()
            out.backward(torch.zeros_like(out))
            ended = time.process_time()
            encoder.zero_grad(set_to_none=True)
            if repeat >= 3:
                times["forward"].append(between - began)
                times["backward"].append(ended - between)
    found = {phase: 1e3 * statistics.median(values) for phase, values in times.items()}
    return found | {"launches": launched[0]}


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser("bench_host.py", __doc__)
    parser.add_argument("--model", default="swinv2_base", help="size")
    parser.add_argument("--repeats", type=command.positive, default=20, help="passes of a round")
    parser.add_argument("--rounds", type=command.positive, default=3, help="rounds, each in a process of its own")
    parser.add_argument("--checkout", type=Path, metavar="DIR",
                        help="another checkout, measured in turns with this one (default: none)")  # fmt: skip
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(measure(args.model, args.repeats)))
        return 0
    if args.checkout and not (args.checkout / "fastmim" / "__init__.py").is_file():
        raise ValueError(f"--checkout {args.checkout}: no checkout of fastmim; give the folder that holds fastmim/")
    checkouts = [ROOT] + ([args.checkout.resolve()] if args.checkout else [])
    rows: dict[Path, list[dict[str, float]]] = {root: [] for root in checkouts}
    for _ in range(args.rounds):
        for root in checkouts:
            words = [sys.executable, __file__, "--alone", "--model", args.model, "--repeats", str(args.repeats)]
            environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{root.name}: exit status {done.returncode}: {done.stderr[-400:]}")
            rows[root].append(json.loads(done.stdout.splitlines()[-1]))
    for root, found in rows.items():
        means = {key: statistics.median(row[key] for row in found) for key in found[0]}
        print(f"{root.name}: forward {means['forward']:.1f} ms, backward {means['backward']:.1f} ms of CPU time, "
              f"{means['launches']:.0f} Triton launches ({args.model}, median of {args.rounds})")
    return 0


if __name__ == "__main__":
    command.exit_with("bench_host.py", main)
