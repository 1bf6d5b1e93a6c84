"""A whole pretraining run from JPEG files: ``fastmim.train`` beside the reference's own loop.

The reference's side uses its clone's loader, augmentation, masks, model, optimiser and schedule, in the order of its
``train_one_epoch``: one loss value a step is read on the host. It leaves out ``.cuda()``, apex and its
DistributedDataParallel wrapper, whose copies would only slow one process down. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import fastmim  # noqa: E402
from benchmarks import command, harness, measure, options  # noqa: E402
from benchmarks.providers import CLIP, DTYPES, Case  # noqa: E402
from benchmarks.reference import KINDS, build_reference, case_config, find_clones, load_modules  # noqa: E402
from fastmim.engine.metrics import read_rows  # noqa: E402

# Case: (our recipe, the clone that publishes the same one).
RUNS = {
    "swin_base": ("swin_base_800ep", "microsoft-simmim"),
    "swinv2_base+47": ("swinv2_base", "microsoft-swin"),
    "vit_base": ("vit_base_800ep", "microsoft-simmim"),
}
EVERY = 5  # steps an interval
SKIPPED = 2  # intervals of warm-up: first allocations, workers starting


def photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Path:
    """``folder``/images with JPEG files of ImageNet's usual size, cut from photographs of scikit-image.

    Raises:
        ValueError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("--data: give a folder of JPEG files in one sub-folder, or pip install scikit-image")
    names = ("astronaut.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg")
    data = Path(next(iter(spec.submodule_search_locations))) / "data"
    photos = [Image.open(data / name).convert("RGB") for name in names if (data / name).is_file()]
    photos = [photo for photo in photos if photo.width >= size[0] and photo.height >= size[1]]
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = draw.randint(0, photo.width - size[0]), draw.randint(0, photo.height - size[1])
        tile = photo.crop((left, top, left + size[0], top + size[1]))
        tile.save(folder / "images" / f"{i:05}.jpg", quality=90)
    return folder


def config_for(spec: dict[str, Any]) -> fastmim.Config:
    """Our published recipe, for so many steps on one process."""
    recipe, _ = RUNS[spec["case"]]
    return fastmim.load_config(
        ROOT / "configs" / "simmim" / f"{recipe}.yaml",
        [
            f"data.path={spec['data']}", f"data.num_workers={spec['workers']}", f"output.dir={spec['output']}",
            f"train.steps={spec['steps']}", f"train.log_every={EVERY}", "train.global_batch_size=null",
            f"train.micro_batch_size={spec['batch']}", f"efficiency.precision={spec['dtype']}", *spec["set"],
        ],
    )  # fmt: skip


def run_ours(spec: dict[str, Any]) -> list[dict[str, float]]:
    """``fastmim.train`` with everything it writes by default."""
    fastmim.train(config_for(spec))
    rows = read_rows(Path(spec["output"]) / "metrics.jsonl")
    return [{"seconds": r["step_time"], "data": r["data_time"], "loss": r["loss"]} for r in rows if "step_time" in r]


def run_reference(spec: dict[str, Any]) -> list[dict[str, float]]:
    """The clone's parts in the order of its ``main`` and ``train_one_epoch``, and its checkpoint at the end."""
    name = RUNS[spec["case"]][1]
    clone = find_clones(spec["reference"])[name]
    config = reference_config(clone, spec)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    log = logging.getLogger("reference")
    loader_file = "data.data_simmim" if name == "microsoft-simmim" else "data.data_simmim_pt"
    data, optimizers, schedulers = load_modules(clone, loader_file, "optimizer", "lr_scheduler")
    old = name == "microsoft-simmim"
    loader = data.build_loader_simmim(config, log) if old else data.build_loader_simmim(config)
    model = build_reference(clone, config)
    arguments: dict[str, Any] = {"logger": log} if old else {"simmim": True}
    optimizer = optimizers.build_optimizer(config, model.model, is_pretrain=True, **arguments)
    scheduler = schedulers.build_scheduler(config, optimizer, len(loader))
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=spec["dtype"] == "bf16")
    model.train()
    rows, interval, began, waited = [], [], time.perf_counter(), 0.0
    batches = _endless(loader)
    for step in range(spec["steps"]):
        start = time.perf_counter()
        images, mask, _ = next(batches)
        waited += time.perf_counter() - start
        with bf16:
            loss = model.model(images, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step_update(step)
        interval.append(loss.item())
        if len(interval) == EVERY:
            now = time.perf_counter()
            rows.append({"seconds": (now - began) / EVERY, "data": waited / EVERY, "loss": statistics.mean(interval)})
            interval, began, waited = [], now, 0.0
    state = {"model": model.model.state_dict(), "optimizer": optimizer.state_dict(), "config": dict(config)}
    Path(spec["output"]).mkdir(parents=True, exist_ok=True)
    torch.save(state, Path(spec["output"]) / "ckpt.pth")
    return rows


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def reference_config(clone: Path, spec: dict[str, Any]) -> Any:
    """The clone's published recipe, with our run's batch, workers and rates."""
    ours = config_for(spec)
    case = Case(spec["case"], spec["dtype"], spec["batch"])
    config = case_config(clone, case.encoder(), case.norm_target)
    config.MODEL.DROP_PATH_RATE = ours.model.drop_path_rate or 0.0
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE = spec["data"], spec["batch"]
    config.DATA.NUM_WORKERS = spec["workers"]
    scale = spec["batch"] / 512
    config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR = ours.optim.lr * scale, ours.optim.warmup_lr * scale
    return config


def child(spec: dict[str, Any]) -> None:
    """One run in this process; prints one line of JSON."""
    torch.set_num_threads(spec["threads"])
    measure.reset_peak_memory("cpu")
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        rows = run_ours(spec) if spec["provider"] == "fastmim" else run_reference(spec)
    wall = time.perf_counter() - began
    print(json.dumps({"rows": rows, "wall": wall, **measure.peak_memory("cpu")}), flush=True)


def run_apart(spec: dict[str, Any]) -> dict[str, Any]:
    """A run in a new process.

    Raises:
        ValueError: it failed; with its last lines.
    """
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, __file__, "--child", json.dumps(spec | {"output": output})]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{spec['provider']}: exit status {done.returncode}: {done.stderr[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(spec: dict[str, Any], names: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Whole runs in turn, in alternating order.

    Raises:
        LossesDiffer: the mean of the last losses is further apart than crops and masks explain.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            runs[name].append(run_apart(spec | {"provider": name}))
    # Crops, masks and first weights are drawn by other generators: the losses agree as numbers of a curve do.
    last = {name: statistics.mean(r["loss"] for run in own for r in run["rows"][-4:]) for name, own in runs.items()}
    harness.check_losses(last, 0.1)
    return runs


def columns(own: list[dict[str, Any]], baseline: list[dict[str, Any]], batch: int) -> dict[str, str]:
    """CSV columns of one provider; ratios are taken interval by interval of the same round."""
    steady = [r for run in own for r in run["rows"][SKIPPED:]]
    other = [r for run in baseline for r in run["rows"][SKIPPED:]]
    seconds = [r["seconds"] for r in steady]
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(steady, other, strict=True)]
    out = {}
    for name, values, digits in (("seconds", seconds, 4), ("images_per_sec", [batch / s for s in seconds], 3),
                                 ("ratio", ratios, 3)):  # fmt: skip
        for suffix, value in zip(("", "_p20", "_p80"), harness.quantiles(values), strict=True):
            out[name + suffix] = f"{value:.{digits}f}"
    out["data_s"] = f"{statistics.median(r['data'] for r in steady):.4f}"
    out["wall_s"] = f"{statistics.median(run['wall'] for run in own):.1f}"
    out["peak_memory_gib"] = f"{max(float(run['peak_memory_gib']) for run in own):.3f}"
    out["memory_kind"] = own[0]["memory_kind"]
    out["loss"] = f"{own[0]['rows'][-1]['loss']:.4f}"
    return out


def measure_run(case: str, dtype: str, args: argparse.Namespace, data: str) -> list[dict[str, Any]]:
    """CSV rows of one run."""
    reference = RUNS[case][1]
    threads = args.threads or torch.get_num_threads()
    spec = dict(case=case, dtype=dtype, batch=args.batch, steps=args.steps, workers=args.workers, data=data,
                reference=args.reference, threads=threads, set=args.set)  # fmt: skip
    runs = compare(spec, [reference, "fastmim"], args.rounds)
    torch.set_num_threads(threads)
    shared = {"benchmark": "pretrain", "baseline": "fastmim", "rounds": args.rounds,
              "note": f"{args.steps} steps, {args.workers} workers",
              **options.describe(Case(case, dtype, args.batch), 1, args)}  # fmt: skip
    return [shared | {"provider": name} | columns(own, runs["fastmim"], args.batch) for name, own in runs.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py pretrain", __doc__)
    parser.add_argument("--cases", nargs="+", default=list(RUNS), choices=list(RUNS), help="runs")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES, help="precisions")
    parser.add_argument("--batch", type=command.positive, default=4, help="images a step")
    parser.add_argument("--steps", type=command.positive, default=50, help="of each run; the first 10 are warm-up")
    parser.add_argument("--rounds", type=command.positive, default=1, help="whole runs of each")
    parser.add_argument("--workers", type=command.positive, default=2, help="loader processes")
    parser.add_argument("--threads", type=command.positive, help="CPU threads of torch (default: its own)")
    parser.add_argument("--data", help="folder with JPEG files in a sub-folder (default: tiles of photographs)")
    parser.add_argument("--reference", metavar="DIR", type=command.checked(find_clones),
                        help="clone(s) of " + ", ".join(KINDS))  # fmt: skip
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of our config")
    parser.add_results("measurements.csv")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child)
        return 0
    if not args.reference:
        print("pretrain: not measured; it needs --reference DIR", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or str(photographs(Path(folder), args.batch * args.steps))
        for case in args.cases:
            for dtype in args.dtypes:
                rows = measure_run(case, dtype, args, data)
                harness.append_rows(args.out, rows)
                for row in rows:
                    print(
                        f"{case:15} {dtype} {row['provider']:18} {row['images_per_sec']:>8} img/s"
                        f" [{row['images_per_sec_p20']}, {row['images_per_sec_p80']}]  data {row['data_s']} s a step"
                        f"  {row['ratio']}x [{row['ratio_p20']}, {row['ratio_p80']}]  whole run {row['wall_s']} s"
                        f"  peak {row['peak_memory_gib']} GiB  loss {row['loss']}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    command.exit_with("run.py pretrain", main)
