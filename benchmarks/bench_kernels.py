"""Every op by itself: provider × forward/backward × encoder size, with errors checked before anything is timed.

    python benchmarks/run.py kernels --model swinv2_base --ops window_attention mlp --dtype bf16
    python benchmarks/run.py kernels --model vit_base
    python benchmarks/run.py kernels --shape grid=56,channels=96,heads=3,window=7 --batch 2

A size stands for the shapes of its first stage, a ViT for those of its blocks; ``--shape`` gives one's own: ``grid``
tokens a side (the image has 4 pixels a token), ``channels``, ``heads``, ``window`` tokens a side, and ``family``, swin
or swinv2. Ops that a ViT does not use are left out.

``reference`` is the plain oracle, ``compiled`` is ``torch.compile`` of it, ``triton`` needs a GPU. There each time is
``triton.testing.do_bench_cudagraph``'s median, without what the host costs, and GB/s are the op's closed-form bytes
over it, as a share of what a copy reaches in the same run (``roofline_share`` of the CSV). On a CPU the providers take
turns, and get their tensors anew after ten rounds: the ratio is the median of the rounds' own. A provider whose output
or gradient is further from float64 than twice the reference's error and one rounding is not timed, and the exit status
is 1. `run.py report` draws the CSV.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import fastmim_kernels as fk  # noqa: E402
from benchmarks import command, harness  # noqa: E402
from benchmarks.kernel_works import WORKS, Work, normal, ops_of, own_shape, position_bias  # noqa: E402
from fastmim.engine.host_memory import keep_freed_memory  # noqa: E402
from fastmim.models.sizes import SIZES  # noqa: E402

# A backward pass is timed again and again on one graph: the compiler must not reuse what it keeps.
functorch_config.donated_buffer = False

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FACTOR, FLOOR = 2.0, 5e-7  # of the reference's own error, and what is always forgiven beside one rounding
CHECK_BATCH = 2
COPY_BYTES = 2**30
Quantiles = tuple[float, float, float]
ROUNDS_AT_ONE_PLACE = 10
"""On a CPU, after which the providers get their tensors anew: where these lie is worth some 4 % of a pass."""
USUAL = ("swin_base", "swinv2_small", "swinv2_base", "swinv2_large", "swinv2_huge", "swinv2_giant")


def provider(op: str, name: str) -> Callable[..., Any]:
    call = position_bias if op == "position_bias" else getattr(fk, op)
    function = functools.partial(call, impl="reference" if name == "compiled" else name)
    if name != "compiled":
        return function
    torch._dynamo.reset()  # every op is the same function to the compiler, which gives up after some versions of one
    return torch.compile(function, dynamic=False)


def prepared(work: Work, dtypes: dict[str, torch.dtype], device: torch.device) -> dict[str, Any]:
    """Arguments on the device, leaves where they get gradients."""
    out = {}
    for name, value in work.arguments.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtypes.get(name, value.dtype), copy=True).requires_grad_(name in work.grads)
        out[name] = value
    return out


def outputs_of(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    out = function(**arguments)
    return [out] if isinstance(out, Tensor) else [o for o in out if o is not None]


def results(function: Callable[..., Any], work: Work, dtypes: dict[str, torch.dtype], device: torch.device
            ) -> list[Tensor]:
    """Outputs, and gradients of a fixed cotangent, rounded so that all precisions see the same."""
    arguments = prepared(work, dtypes, device)
    outputs = outputs_of(function, arguments)
    if not work.grads:
        return outputs
    cotangents = [normal(*o.shape).bfloat16().to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [arguments[n] for n in work.grads], cotangents)]


def errors(op: str, work: Work, names: list[str], dtype: torch.dtype, device: torch.device
           ) -> dict[str, tuple[float, float]]:
    """(error, limit) of each provider's output or gradient that is worst beside its limit."""
    low = dict.fromkeys(work.low, dtype)
    rounded = {k: v.to(dtype).to(v) if k in low else v for k, v in work.arguments.items()}
    work = Work(rounded, work.low, work.grads)
    double = {k: torch.float64 for k, v in rounded.items() if isinstance(v, Tensor) and v.is_floating_point()}
    truth = results(provider(op, "reference"), work, double, device)
    plain = results(provider(op, "reference"), work, low, device)
    found = {}
    for name in names:
        ours = results(provider(op, name), work, low, device)
        # The reference may keep in float32 what an op rounds once to the low precision.
        pairs = [(relative(o, t), FACTOR * relative(p, t) + torch.finfo(dtype).eps / 2 + FLOOR)
                 for o, p, t in zip(ours, plain, truth, strict=True)]  # fmt: skip
        found[name] = max(pairs, key=lambda pair: pair[0] / pair[1])
    return found


def relative(value: Tensor, truth: Tensor) -> float:
    """RMS of the difference over that of ``truth``; infinite where it is not a number."""
    error = (value.double() - truth).square().mean().sqrt().item()
    return error / (truth.square().mean().sqrt().item() or 1.0) if error == error else float("inf")


def calls_of(function: Callable[..., Any], work: Work, dtypes: dict[str, torch.dtype], device: torch.device
             ) -> dict[str, Callable[[], Any]]:
    """What is timed: forward without autograd, and backward through a graph that is kept; or both as a step."""
    arguments = prepared(work, dtypes, device)

    def forward() -> None:
        with torch.no_grad():
            function(**arguments)

    if not work.grads:
        return {"forward": forward}
    leaves = [arguments[n] for n in work.grads]

    def step() -> None:
        outputs = outputs_of(function, arguments)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    if work.together:
        return {"step": step}
    return {"forward": forward, "backward": backward_of(lambda: outputs_of(function, arguments), leaves)}


def backward_of(forward: Callable[[], list[Tensor]], leaves: list[Tensor]) -> Callable[[], None]:
    """The backward pass through one graph that is kept.

    A backward pass runs on the stream of its forward pass, which has therefore to be the one that is captured.
    """
    made: list[tuple[list[Tensor], list[Tensor]]] = []

    def backward() -> None:
        if not made:
            with capture_stream(leaves[0].device):
                outputs = forward()
                made.append((outputs, [torch.ones_like(o) for o in outputs]))
        torch.autograd.grad(made[0][0], leaves, made[0][1], retain_graph=True)

    return backward


def capture_stream(device: torch.device) -> AbstractContextManager[Any]:
    """The stream on which ``torch.cuda.graph`` captures, as the current one; all work before is done."""
    if device.type != "cuda":
        return nullcontext()
    graph: Any = torch.cuda.graph
    if graph.default_capture_stream is None:
        graph.default_capture_stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    return torch.cuda.stream(graph.default_capture_stream)


def times(steps: dict[str, Callable[[], Any]], device: torch.device, rounds: int, *, graphs: bool = True
          ) -> dict[str, tuple[float, float, float]]:
    """Seconds of each step: median, 20 % and 80 % quantile.

    ``graphs``: on a GPU from CUDA graphs, without what the host costs; otherwise, and where a step cannot be captured,
    by events.
    """
    if device.type == "cpu":
        return {name: t.quantiles() for name, t in harness.interleave(steps, rounds=rounds).items()}
    found = {}
    for name, step in steps.items():
        middle, low, high = _on_gpu(name, step, graphs)
        found[name] = (middle / 1e3, low / 1e3, high / 1e3)
    return found


def compared(made: Callable[[list[str]], dict[str, Callable[[], Any]]], names: list[str], device: torch.device,
             rounds: int) -> dict[str, tuple[Quantiles, tuple[float, ...]]]:
    """Seconds of the calls that ``made`` returns, and how many times faster than the reference each is, if it is there:
    on a CPU median and quantiles of the rounds, on a GPU the ratio of the medians alone.

    On a CPU they are made anew from time to time, in the other order, so that none keeps the better place in memory.
    """
    if device.type != "cpu":
        found = times(made(names), device, rounds)
        base = found.get("reference")
        return {n: (q, (base[0] / q[0],) if base else ()) for n, q in found.items()}
    taken: dict[str, tuple[float, ...]] = {}
    for start in range(0, rounds, ROUNDS_AT_ONE_PLACE):
        calls = made(names)
        if not calls:  # an op without this direction
            return {}
        timings = harness.interleave(calls, rounds=min(rounds - start, ROUNDS_AT_ONE_PLACE))
        taken = {n: taken.get(n, ()) + t.seconds for n, t in timings.items()}
        names = names[::-1]
    all_of = {n: harness.Timing(seconds) for n, seconds in taken.items()}
    baseline = all_of.get("reference")
    return {n: (t.quantiles(), harness.speedup(baseline, t) if baseline else ()) for n, t in all_of.items()}


def _on_gpu(name: str, step: Callable[[], Any], graphs: bool) -> Sequence[float]:
    from triton.testing import do_bench, do_bench_cudagraph

    wanted = (0.5, 0.2, 0.8)
    if graphs:
        try:
            captured: Sequence[float] = do_bench_cudagraph(step, quantiles=wanted)
            return captured
        except RuntimeError as error:  # a copy from the host, or a value that it reads
            print(f"{name}: timed by events, {' '.join(str(error).split())[:120]}", flush=True)
            torch.cuda.synchronize()
    by_events: Sequence[float] = do_bench(step, quantiles=wanted)
    return by_events


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """GB/s, read and written, of a copy far larger than the caches."""
    source = torch.empty(COPY_BYTES // (8 if device.type == "cpu" else 1), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = times({"copy": lambda: target.copy_(source)}, device, rounds)["copy"][0]
    return 2 * source.numel() / seconds / 1e9


def matmul_rate(device: torch.device, rounds: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product far larger than it takes to fill the device."""
    edge = 512 if device.type == "cpu" else 8192
    a, b = torch.randn(2, edge, edge, device=device, dtype=dtype).unbind()
    out = torch.empty_like(a)
    seconds = times({"matmul": lambda: torch.mm(a, b, out=out)}, device, rounds)["matmul"][0]
    return 2 * edge**3 / seconds / 1e12


def measure(op: str, size: str, shape: dict[str, Any], args: argparse.Namespace, device: torch.device, copy: float
            ) -> list[dict[str, Any]]:
    """CSV rows of one op at one size; of a provider with a red gate there is one row without times."""
    dtype, names = DTYPES[args.dtype], args.providers
    gates = errors(op, WORKS[op](shape, CHECK_BATCH, dtype.itemsize), names, dtype, device)
    shared = {"benchmark": "kernels", "case": f"{op} {size}", "dtype": args.dtype, "batch": args.batch,
              "device": _device_name(device), "baseline": "reference", "rounds": args.rounds,
              **harness.environment()}  # fmt: skip
    work = WORKS[op](shape, args.batch, dtype.itemsize)
    low = dict.fromkeys(work.low, dtype)
    green = [n for n in names if gates[n][0] <= gates[n][1]]
    rows = [shared | _gate(n, gates[n]) for n in names if n not in green]
    functions = {n: provider(op, n) for n in green}

    def made(direction: str, names: list[str]) -> dict[str, Callable[[], Any]]:
        calls = {n: calls_of(functions[n], work, low, device) for n in names}
        return {n: c[direction] for n, c in calls.items() if direction in c}

    moved_by = {"forward": work.bytes_forward, "backward": work.bytes_backward}
    moved_by["step"] = sum(filter(None, moved_by.values()))
    for direction, moved in moved_by.items():
        for name, (values, ratio) in compared(functools.partial(made, direction), green, device,
                                                args.rounds).items():
            row = shared | _gate(name, gates[name]) | {"case": f"{op} {direction} {size}"}
            row |= dict(zip(("seconds", "seconds_p20", "seconds_p80"), (f"{v:.3e}" for v in values), strict=True))
            row |= dict(zip(("ratio", "ratio_p20", "ratio_p80"), (f"{v:.3f}" for v in ratio), strict=False))
            if moved:
                speed = moved / values[0] / 1e9
                row |= {"roofline_share": f"{speed / copy:.4g}", "mb_per_image": f"{moved / args.batch / 1e6:.4g}",
                        "note": f"{speed:.4g} GB/s, a copy {copy:.1f}; {row['note']}"}  # fmt: skip
            rows.append(row)
    return rows


def _gate(name: str, gate: tuple[float, float]) -> dict[str, Any]:
    return {"provider": name, "note": f"error {gate[0]:.2e} <= {gate[1]:.2e}"} if gate[0] <= gate[1] else \
        {"provider": name, "note": f"NOT TIMED: error {gate[0]:.2e} > {gate[1]:.2e}"}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = command.Parser("run.py kernels", __doc__)
    parser.add_argument("--sizes", "--model", nargs="+", choices=list(SIZES), metavar="SIZE",
                        help=f"encoders (default: {' '.join(USUAL)}; none with --shape)")  # fmt: skip
    parser.add_argument("--shape", nargs="+", type=command.checked(own_shape), default=[], metavar="KEY=N,…",
                        help="own shapes: grid=, channels=, heads=, window= and family=")  # fmt: skip
    parser.add_argument("--ops", nargs="+", choices=list(WORKS), default=list(WORKS), help="of these, what fits")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="precision")
    providers = ["triton"] * on_gpu + ["torch", "reference", "compiled"]
    parser.add_argument("--providers", nargs="+", choices=("triton", "torch", "reference", "compiled"),
                        default=providers, help="implementations; triton needs a GPU")  # fmt: skip
    parser.add_argument("--batch", type=command.positive, default=128 if on_gpu else 4, help="images")
    parser.add_argument("--rounds", type=command.positive, default=7, help="timed rounds on a CPU")
    parser.add_results("measurements.csv")
    args = parser.parse_args(argv)
    if "triton" in args.providers and not on_gpu:
        parser.error("--providers triton: torch sees no CUDA GPU here; use torch, reference or compiled")
    return args


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """(name in the rows, shapes, ops that fit) of every size and shape that is asked for."""
    chosen = args.sizes or ([] if args.shape else USUAL)
    found = {name: SIZES[name] for name in chosen} | {text: own_shape(text) for text in args.shape}
    for name, shape in found.items():
        ops, reasons = ops_of(shape, args.ops)
        for reason in reasons:
            print(f"{name}: {reason}", flush=True)
        yield name, shape, ops


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as train() does; else page faults, which depend on what ran before, hide the ops
    copy, red = copy_bandwidth(device, args.rounds), 0
    for size, shape, ops in shapes(args):
        for op in ops:
            rows = measure(op, size, shape, args, device, copy)
            harness.append_rows(args.out, rows)
            for r in rows:
                red += "seconds" not in r
                print(f"{r['case']:40} {r['provider']:10} {r.get('seconds', '-')} s, {r.get('ratio', '-')}x; "
                      f"{r['note']}", flush=True)  # fmt: skip
    return int(bool(red))


if __name__ == "__main__":
    command.exit_with("run.py kernels", main)
