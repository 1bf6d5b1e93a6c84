"""Every op by itself: provider × forward/backward × encoder size, with errors checked before anything is timed.

    python benchmarks/bench_kernels.py [--sizes swinv2_base …] [--ops window_attention …] [--dtype bf16]
                                       [--providers triton torch reference compiled] [--batch N] [--rounds N]
                                       [--out CSV] [--plot PNG]

``reference`` is the plain oracle, ``compiled`` is ``torch.compile`` of it, ``triton`` needs a GPU. There each time is
``triton.testing.do_bench``'s median, and GB/s are the op's closed-form bytes over it, as a share of what a copy
reaches in the same run; on a CPU the providers take turns. A provider whose output or gradient is further from
float64 than twice the reference's error and one rounding is not timed, and the exit status is 1. The plot is drawn
from the CSV.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim.models.sizes import SIZES
from fastmim_kernels.gelu import traffic as gelu_traffic
from fastmim_kernels.local_norm import traffic as local_norm_traffic
from fastmim_kernels.mask_tokens import traffic as mask_tokens_traffic
from fastmim_kernels.patch_merge import traffic as patch_merge_traffic
from fastmim_kernels.residual_norm import traffic as residual_norm_traffic
from fastmim_kernels.window_attention import traffic as window_attention_traffic

EXTRA = ("size", "direction", "gb_per_s", "copy_gb_per_s", "copy_share", "error", "error_limit")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FACTOR, FLOOR = 2.0, 5e-7  # of the reference's own error, and what is always forgiven beside one rounding
CHECK_BATCH = 2
GRID = 48  # tokens a side in the first stage at 192 px, where the maps are largest
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Work:
    """Arguments of one op; ``low`` are in the low precision, ``grads`` get gradients, bytes are closed forms."""

    arguments: dict[str, Any]
    low: tuple[str, ...]
    grads: tuple[str, ...]
    bytes_forward: int | None = None
    bytes_backward: int | None = None


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _moved(traffic: tuple[tuple[int, int, int], tuple[int, int, int]]) -> tuple[int, int]:
    return sum(traffic[0][:2]), sum(traffic[1][:2])


def _window_attention(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    edge, heads, cosine = size["window_size"], size["num_heads"][0], size["name"] == "swinv2"
    qkv, window = _normal(batch, GRID, GRID, 3 * size["embed_dim"]), (edge, edge)
    arguments = {"qkv": qkv, "bias": _normal(heads, edge**2, edge**2), "num_heads": heads, "window_size": window,
                 "shift_size": (edge // 2, edge // 2)}  # fmt: skip
    if cosine:
        arguments["logit_scale"] = 2 + _normal(heads, scale=0.1)
    moved = _moved(window_attention_traffic(qkv.shape, heads, window, itemsize=itemsize))
    return Work(arguments, ("qkv",), ("qkv", "bias", "logit_scale")[: 2 + cosine], *moved)


def _residual_norm(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    c, order = size["embed_dim"], "post" if size["name"] == "swinv2" else "pre"
    shape = (batch, GRID, GRID, c)
    arguments = {"residual": _normal(*shape), "branch": _normal(*shape, scale=0.5), "order": order,
                 "weight": 1 + _normal(c, scale=0.1), "bias": _normal(c)}  # fmt: skip
    moved = _moved(residual_norm_traffic(batch * GRID**2, c, order, itemsize=4, branch_itemsize=itemsize,
                                         out_itemsize=4))  # fmt: skip
    return Work(arguments, ("branch",), ("residual", "branch", "weight", "bias"), *moved)


def _patch_merge(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    x = _normal(batch, GRID, GRID, size["embed_dim"])
    moved = _moved(patch_merge_traffic(tuple(x.shape), norm=False, itemsize=itemsize, out_itemsize=itemsize))
    return Work({"x": x}, ("x",), ("x",), *moved)


def _gelu(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    rows, c = batch * GRID**2, 4 * size["embed_dim"]
    return Work({"x": _normal(rows, c), "bias": _normal(c)}, ("x",), ("x", "bias"),
                *_moved(gelu_traffic(rows, c, itemsize=itemsize)))  # fmt: skip


def _mlp(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    rows, c = batch * GRID**2, size["embed_dim"]
    arguments = {"x": _normal(rows, c), "weight1": _normal(4 * c, c, scale=c**-0.5), "bias1": _normal(4 * c),
                 "weight2": _normal(c, 4 * c, scale=c**-0.5), "bias2": _normal(c)}  # fmt: skip
    return Work(arguments, ("x",), tuple(arguments))


def _mask_tokens(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    c = size["embed_dim"]
    tokens = _normal(batch, GRID, GRID, c)
    mask = torch.rand(tokens.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.6
    moved = _moved(mask_tokens_traffic(tuple(tokens.shape), visible=1 - mask.double().mean().item(),
                                       itemsize=itemsize, out_itemsize=itemsize))  # fmt: skip
    return Work({"tokens": tokens, "mask": mask, "mask_token": _normal(c)}, ("tokens",), ("tokens", "mask_token"),
                *moved)  # fmt: skip


def _linear_masked_l1(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    c = 8 * size["embed_dim"]
    mask = torch.rand((batch, GRID, GRID), generator=torch.Generator().manual_seed(0)) < 0.6
    arguments = {"tokens": _normal(batch, 6, 6, c), "weight": _normal(3072, c, scale=c**-0.5), "bias": _normal(3072),
                 "target": _normal(batch, 3, 192, 192), "mask": mask, "stride": 32}  # fmt: skip
    return Work(arguments, ("tokens",), ("tokens", "weight", "bias"))


def _local_norm_target(size: dict[str, Any], batch: int, itemsize: int) -> Work:
    images = _normal(batch, 3, 192, 192)
    return Work({"images": images, "kernel_size": 47}, (), (), sum(local_norm_traffic(tuple(images.shape))[:2]))


WORKS: dict[str, Callable[[dict[str, Any], int, int], Work]] = {
    "window_attention": _window_attention, "residual_norm": _residual_norm, "mlp": _mlp, "gelu": _gelu,
    "patch_merge": _patch_merge, "mask_tokens": _mask_tokens, "linear_masked_l1": _linear_masked_l1,
    "local_norm_target": _local_norm_target,
}  # fmt: skip


def provider(op: str, name: str) -> Callable[..., Any]:
    function = functools.partial(getattr(fk, op), impl="reference" if name == "compiled" else name)
    return torch.compile(function, dynamic=False) if name == "compiled" else function


def prepared(work: Work, dtypes: dict[str, torch.dtype], device: torch.device) -> dict[str, Any]:
    """Arguments on the device, leaves where they get gradients."""
    out = {}
    for name, value in work.arguments.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtypes.get(name, value.dtype)).requires_grad_(name in work.grads)
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
    cotangents = [_normal(*o.shape).bfloat16().to(o) for o in outputs]
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
        pairs = [(_relative(o, t), FACTOR * _relative(p, t) + torch.finfo(dtype).eps / 2 + FLOOR)
                 for o, p, t in zip(ours, plain, truth, strict=True)]  # fmt: skip
        found[name] = max(pairs, key=lambda pair: pair[0] / pair[1])
    return found


def _relative(value: Tensor, truth: Tensor) -> float:
    error = (value.double() - truth).square().mean().sqrt().item()
    return error / (truth.square().mean().sqrt().item() or 1.0) if error == error else float("inf")


def calls(op: str, name: str, work: Work, dtypes: dict[str, torch.dtype], device: torch.device
          ) -> dict[str, Callable[[], Any]]:
    """What is timed: forward without autograd, and backward through a graph that is kept."""
    function, arguments = provider(op, name), prepared(work, dtypes, device)

    def forward() -> None:
        with torch.no_grad():
            function(**arguments)

    if not work.grads:
        return {"forward": forward}
    outputs = outputs_of(function, arguments)
    cotangents, leaves = [torch.ones_like(o) for o in outputs], [arguments[n] for n in work.grads]
    return {"forward": forward,
            "backward": lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)}  # fmt: skip


def times(steps: dict[str, Callable[[], Any]], device: torch.device, rounds: int
          ) -> dict[str, tuple[float, float, float]]:
    """Seconds of each step: median, 20 % and 80 % quantile."""
    if device.type == "cpu":
        return {name: t.quantiles() for name, t in harness.interleave(steps, rounds=rounds).items()}
    from triton.testing import do_bench

    found = {}
    for name, step in steps.items():
        middle, low, high = do_bench(step, quantiles=(0.5, 0.2, 0.8))
        found[name] = (middle / 1e3, low / 1e3, high / 1e3)
    return found


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """GB/s, read and written, of a copy far larger than the caches."""
    source = torch.empty(COPY_BYTES // (8 if device.type == "cpu" else 1), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = times({"copy": lambda: target.copy_(source)}, device, rounds)["copy"][0]
    return 2 * source.numel() / seconds / 1e9


def measure(op: str, size: str, names: list[str], args: argparse.Namespace, device: torch.device, copy: float
            ) -> list[dict[str, Any]]:
    """CSV rows of one op at one size; of a provider with a red gate there is one row without times."""
    dtype = DTYPES[args.dtype]
    gates = errors(op, WORKS[op](SIZES[size], CHECK_BATCH, dtype.itemsize), names, dtype, device)
    shared = {"benchmark": "kernels", "case": op, "size": size, "dtype": args.dtype, "batch": args.batch,
              "device": _device_name(device), "copy_gb_per_s": f"{copy:.1f}", "baseline": "reference",
              "rounds": args.rounds, **harness.environment()}  # fmt: skip
    work = WORKS[op](SIZES[size], args.batch, dtype.itemsize)
    low = dict.fromkeys(work.low, dtype)
    green = [n for n in names if gates[n][0] <= gates[n][1]]
    rows = [shared | _gate(n, gates[n]) for n in names if n not in green]
    steps = {n: calls(op, n, work, low, device) for n in green}
    for direction, moved in (("forward", work.bytes_forward), ("backward", work.bytes_backward)):
        mine = {n: s[direction] for n, s in steps.items() if direction in s}
        seconds = times(mine, device, args.rounds) if mine else {}
        for name, values in seconds.items():
            row = shared | _gate(name, gates[name]) | {"direction": direction}
            row |= dict(zip(("seconds", "seconds_p20", "seconds_p80"), (f"{v:.3e}" for v in values), strict=True))
            if "reference" in seconds:
                row["ratio"] = f"{seconds['reference'][0] / values[0]:.3f}"
            if moved:
                row |= {"gb_per_s": f"{moved / values[0] / 1e9:.4g}",
                        "copy_share": f"{moved / values[0] / 1e9 / copy:.4g}"}  # fmt: skip
            rows.append(row)
    return rows


def _gate(name: str, gate: tuple[float, float]) -> dict[str, Any]:
    return {"provider": name, "error": f"{gate[0]:.2e}", "error_limit": f"{gate[1]:.2e}"}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def plot(table: Path, picture: Path) -> None:
    """Speed-up over the reference of every op, size, direction and provider of the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with table.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["ratio"] and r["provider"] != "reference"]
    labels = list(dict.fromkeys(f"{r['case']} {r['direction']}, {r['size']} {r['dtype']}" for r in rows))
    providers = sorted({r["provider"] for r in rows})
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(labels)), layout="constrained")
    for i, name in enumerate(providers):
        mine = {f"{r['case']} {r['direction']}, {r['size']} {r['dtype']}": float(r["ratio"])
                for r in rows if r["provider"] == name}  # fmt: skip
        height = 0.8 / len(providers)
        axes.barh([labels.index(k) + i * height for k in mine], list(mine.values()), height, label=name)
    axes.set_yticks([i + 0.4 - 0.4 / len(providers) for i in range(len(labels))], labels, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the reference, {rows[-1]['device']}" if rows else "nothing was timed")
    axes.legend()
    figure.savefig(picture, dpi=100)


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[k for k in SIZES if k.startswith("swin")], default=[
        "swin_base", "swinv2_small", "swinv2_base", "swinv2_large", "swinv2_huge", "swinv2_giant"])  # fmt: skip
    parser.add_argument("--ops", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--providers", nargs="+", choices=("triton", "torch", "reference", "compiled"),
                        default=["triton"] * on_gpu + ["torch", "reference", "compiled"])  # fmt: skip
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / f"kernels_{'gpu' if on_gpu else 'cpu'}.csv")
    parser.add_argument("--plot", type=Path, help="draw the speed-ups of the whole CSV")
    args = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    copy, red = copy_bandwidth(device, args.rounds), 0
    for size in args.sizes:
        for op in args.ops:
            rows = measure(op, size, args.providers, args, device, copy)
            harness.append_rows(args.out, rows, columns=(*harness.COLUMNS, *EXTRA))
            for r in rows:
                red += "seconds" not in r
                result = f"{r['seconds']} s, {r.get('ratio', '-')}x, {r.get('gb_per_s', '-')} GB/s" \
                    if "seconds" in r else "NOT TIMED"  # fmt: skip
                print(f"{op:18} {size:13} {r['provider']:10} {r.get('direction', ''):9} {result}  error {r['error']} "
                      f"<= {r['error_limit']}", flush=True)  # fmt: skip
    if args.plot:
        plot(args.out, args.plot)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
