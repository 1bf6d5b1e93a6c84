"""Images a second out of a folder of photographs: our loaders beside the reference's composition, interleaved.

    python benchmarks/bench_data.py [--images 1024] [--workers 2] [--rounds 5] [--providers ...] [--out CSV]
    python benchmarks/bench_data.py --soak 30 --providers torchvision      # resident memory while it reads

Tiles of 500x375 px, quality 90, are cut from the photographs that scikit-image and scikit-learn ship. Every provider
makes micro-batches of 192 px SimMIM crops (scale 0.67-1, bilinear, flip) with the same number of worker processes of
one thread each (dali: as many threads again, its own). ``reference`` is what SimMIM's loader is made of: PIL,
RandomResizedCrop, ToTensor, Normalize, a mask in numpy, default collate, DataLoader. Ours hand out uint8, because
normalisation belongs to the step's first kernel and the mask to the device; ``+float`` rows add both on the host,
so that the outputs are those of the reference.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness  # noqa: E402
from fastmim.data import build_loader, pack_images  # noqa: E402
from fastmim.data.demo import _find_photos  # noqa: E402
from fastmim.data.loader import PREFETCH  # noqa: E402
from fastmim.objectives.unit_masks import UnitMasks  # noqa: E402

SIZE, TILE, UNIT, PATCH, MASK_RATIO, BATCH = 192, (500, 375), 32, 4, 0.6, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROVIDERS = ("reference", "torchvision", "torchvision+float", "torchvision-shards", "pil", "dali", "dali+float")
SETTLE_SECONDS = 1.0


def make_tiles(folder: Path, count: int) -> None:
    """Write `count` tiles, all different."""
    photos = [Image.open(path).convert("RGB") for path, _ in _find_photos()]
    rng = random.Random(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        width = min(photo.width, photo.height * 4 // 3, round(TILE[0] / rng.uniform(0.8, 1.25)))
        height = width * 3 // 4
        left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
        tile = photo.crop((left, top, left + width, top + height)).resize(TILE, Image.Resampling.BICUBIC)
        tile.save(folder / f"{i:05d}.jpg", quality=90)


class ReferenceDataset(Dataset[Any]):
    """One image and one mask an item, as the reference composes them."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())
        self.transform = transforms.Compose([
            transforms.Lambda(_to_rgb),
            transforms.RandomResizedCrop(SIZE, scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[Tensor, np.ndarray[Any, Any], int]:
        with open(self.paths[item], "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), numpy_mask(), 0


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB") if image.mode != "RGB" else image


def numpy_mask() -> np.ndarray[Any, Any]:
    """A random mask of 32 px units on the grid of 4 px patches."""
    units = SIZE // UNIT
    mask = np.zeros(units**2, dtype=int)
    mask[np.random.permutation(units**2)[: int(np.ceil(units**2 * MASK_RATIO))]] = 1
    return mask.reshape(units, units).repeat(UNIT // PATCH, axis=0).repeat(UNIT // PATCH, axis=1)


def reference_reader(folder: Path, workers: int) -> Callable[[], int]:
    """A function that reads one epoch and returns the number of images."""
    loader: DataLoader[Any] = DataLoader(
        ReferenceDataset(folder), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return lambda: sum(len(images) for images, _, _ in loader)


def our_reader(name: str, folder: Path, workers: int, every: int = 2) -> Callable[[], int]:
    """The same for one of our loaders, `every` epochs apart: one that was read ahead would be a head start."""
    kind, _, as_float = name.partition("+")
    loader = build_loader(
        path=folder, img_size=(SIZE, SIZE), micro_batch_size=BATCH, num_workers=workers, verify="none",
        loader=kind.partition("-")[0],
    )  # fmt: skip
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    masks = UnitMasks(SIZE, PATCH, kind="random", mask_ratio=MASK_RATIO, unit=UNIT)
    epochs = iter(range(0, 1 << 30, every))

    def read() -> int:
        count = 0
        for images, sample_ids in loader.epoch(next(epochs)):
            if as_float:
                images = (images - mean) / std
                masks(sample_ids)
            count += len(images)
        return count

    return read


def measure(folder: Path, args: argparse.Namespace, kb: float) -> list[dict[str, Any]]:
    """CSV rows of all providers, timed in turn; between turns the workers come to rest."""
    shards = folder.parent / "shards"
    if not shards.exists() and any(name.endswith("-shards") for name in args.providers):
        pack_images(folder, shards)
    readers = {
        name: reference_reader(folder, args.workers)
        if name == "reference"
        else our_reader(name, shards if name.endswith("-shards") else folder, args.workers)
        for name in args.providers
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    cpu: dict[str, list[float]] = {name: [] for name in readers}
    count = 0
    for i in range(-1, args.rounds):  # the first round warms up
        for name in list(readers) if i % 2 else reversed(list(readers)):
            start, used = time.perf_counter(), cpu_seconds()
            count = readers[name]()
            elapsed = time.perf_counter() - start
            time.sleep(SETTLE_SECONDS)
            if i >= 0:
                seconds[name].append(elapsed)
                cpu[name].append((cpu_seconds() - used) / (count + read_ahead(name, args.workers)))
    timings = {name: harness.Timing(tuple(values)) for name, values in seconds.items()}
    used_cpu = {name: harness.Timing(tuple(values)) for name, values in cpu.items()}
    case = f"{count} JPEG of {TILE[0]}x{TILE[1]} px, {kb:.0f} kB, {args.workers} workers"
    shared = {"benchmark": "data", "case": case, "batch": BATCH, "img_size": SIZE, "device": "cpu",
              "baseline": "reference", "rounds": args.rounds, **harness.environment()}  # fmt: skip
    return [shared | {"provider": name} | figures(name, timings, used_cpu, count) for name in readers]


def cpu_seconds() -> float:
    """Processor time of this process and its living children so far: what a busy machine does not change much."""
    pids = [str(os.getpid())]
    for thread in Path("/proc/self/task").iterdir():
        pids += (thread / "children").read_text().split()
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def read_ahead(name: str, workers: int) -> int:
    """Images made beyond the epoch by the time the workers rest: ours go on into the next one."""
    if name == "reference":
        return 0
    return BATCH if name.startswith("dali") else workers * PREFETCH * BATCH


def figures(
    name: str, timings: dict[str, harness.Timing], cpu: dict[str, harness.Timing], count: int
) -> dict[str, str]:
    """The measured columns of one provider; a core is a second of processor time, of all processes together."""
    found = timings[name].quantiles()
    ratio = harness.speedup(timings["reference"], timings[name])
    out = {f"seconds{tail}": f"{value:.3f}" for tail, value in zip(("", "_p20", "_p80"), found, strict=True)}
    out |= {f"ratio{tail}": f"{value:.3f}" for tail, value in zip(("", "_p20", "_p80"), ratio, strict=True)}
    used = cpu[name].quantiles()[0]
    return out | {
        "images_per_sec": f"{count / found[0]:.0f}",
        "note": f"{1 / used:.0f} images a core-second, {harness.speedup(cpu['reference'], cpu[name])[0]:.2f}x in "
                f"processor time; {versions()}",
    }


def versions() -> str:
    """Of the decoders, which the schema has no columns for."""
    import torchvision

    try:
        from nvidia import dali
    except ImportError:
        return f"torchvision {torchvision.__version__}"
    return f"torchvision {torchvision.__version__}, dali {dali.__version__}"


def memory_mib() -> tuple[float, float]:
    """Resident MiB of this process, and proportional MiB of it with its children (shared pages counted once)."""
    own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in [str(os.getpid()), *children]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return own / 2**20, total / 2**20


def soak(name: str, folder: Path, args: argparse.Namespace) -> None:
    """Read without end for `args.soak` minutes and print the memory every half minute."""
    read = our_reader(name, folder, args.workers, every=1)
    began, images, at_2, due = time.perf_counter(), 0, (0.0, 0.0), 0.0
    print("minute,images,rss_mib,pss_mib_with_workers", flush=True)
    while (minutes := (time.perf_counter() - began) / 60) < args.soak:
        images += read()
        if minutes >= due:
            own, total = memory_mib()
            print(f"{minutes:.1f},{images},{own:.1f},{total:.1f}", flush=True)
            due += 0.5
            at_2 = at_2 if at_2[0] or minutes < 2 else (own, total)
    own, total = memory_mib()
    if at_2[0]:
        print(f"end against minute 2: rss {own / at_2[0]:.4f}, with workers {total / at_2[1]:.4f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py data", __doc__)
    parser.add_argument("--images", type=command.positive, default=1024, help="tiles that are cut")
    parser.add_argument("--workers", type=command.positive, default=2, help="loader processes")
    parser.add_argument("--rounds", type=command.positive, default=5, help="timed rounds of each")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS, help="loaders")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="log memory of the first of --providers instead")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the tiles here, or use those that are there")
    parser.add_results("measurements.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)) / "tiles"
        if not folder.exists():
            folder.mkdir(parents=True)
            make_tiles(folder, args.images)
        kb = sum(path.stat().st_size for path in folder.iterdir()) / len(list(folder.iterdir())) / 1e3
        if args.soak:
            soak(args.providers[0], folder, args)
            return 0
        rows = measure(folder, args, kb)
    harness.append_rows(args.out, rows)
    for row in rows:
        span = f"[{row['ratio_p20']}, {row['ratio_p80']}]"
        print(f"{row['provider']:20} {row['images_per_sec']:>5} img/s  {row['ratio']}x {span}  {row['note']}")
    return 0


if __name__ == "__main__":
    command.exit_with("run.py data", main)
