"""Does a big model fit? Constructs it under ZeRO-3 without ever holding the whole of it, and does one real step.

    torchrun --nproc_per_node 2 benchmarks/big_model.py --model swinv2_huge

Prints one JSON line per rank: seconds and peak resident memory after construction, after the engine, after one
step, and what the rank holds by ``ZeroEngine.held_bytes``. Works on a CPU; nothing is written.
SwinV2-H on two ranks needs 9.4 GiB in each.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks import command  # noqa: E402
from fastmim.config import load_config  # noqa: E402
from fastmim.data import Batch  # noqa: E402
from fastmim.engine.build import make_deepspeed_config, make_engine, make_objective  # noqa: E402
from fastmim.engine.distributed import distributed, exit_process  # noqa: E402
from fastmim.engine.loop import train_step  # noqa: E402

GIB = 2**30


def peak_rss() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("big_model.py", __doc__)
    parser.add_argument("--model", default="swinv2_huge", help="size")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="of the products")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of a run")
    options = parser.parse_args(argv)
    # Buckets of DeepSpeed's default size would be larger than this machine.
    small = "{zero_optimization: {reduce_bucket_size: 20000000, sub_group_size: 50000000, "
    small += "stage3_prefetch_bucket_size: 0, stage3_max_live_parameters: 50000000}}"
    cfg = load_config(None, [
        f"model.name={options.model}", "data.path=.", "train.micro_batch_size=1", "efficiency.zero_stage=3",
        "efficiency.recompute=full", f"efficiency.precision={options.precision}", f"efficiency.deepspeed={small}",
        *options.overrides,
    ])  # fmt: skip
    with distributed(always=True) as world:
        report = measure(cfg, world)
        print(json.dumps({"model": options.model, "rank": world.rank, "ranks": world.size, **report}), flush=True)
    exit_process(0)
    return 0


def measure(cfg: Any, world: Any) -> dict[str, Any]:
    report: dict[str, Any] = {"import_gib": round(peak_rss(), 2)}
    deepspeed = make_deepspeed_config(cfg, world)
    start = time.perf_counter()
    objective = make_objective(cfg, world, deepspeed)
    report |= {"construct_s": round(time.perf_counter() - start, 1), "construct_gib": round(peak_rss(), 2)}
    report["parameters"] = sum(p.ds_numel for p in objective.parameters())
    engine = make_engine(cfg, objective, world, deepspeed)
    gc.collect()
    report["engine_gib"] = round(peak_rss(), 2)
    images = torch.randn(cfg.train.micro_batch_size, objective.in_chans, *objective.img_size)
    batches = iter([(0, Batch(images, torch.arange(len(images))))])
    start = time.perf_counter()
    train_step(engine, batches, lr=1e-4, seed=0, total=1, steps_per_epoch=1)
    means = engine.read()
    report |= {"step_s": round(time.perf_counter() - start, 1), "peak_gib": round(peak_rss(), 2)}
    return report | means | {"held_gib": {k: v / GIB for k, v in engine.held_bytes().items()}}


if __name__ == "__main__":
    command.exit_with("big_model.py", main)
