"""``build_loader``: which images, which order, and who reads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmim.data import dali
from fastmim.data.augment import View, check_views
from fastmim.data.decode import check_decode_options
from fastmim.data.held_out import split
from fastmim.data.index import ImageIndex
from fastmim.data.loader import Loader
from fastmim.data.order import EpochOrder
from fastmim.data.rand_augment import check_augmentation
from fastmim.data.reading import check_reading, checked
from fastmim.data.several import weighted_spans
from fastmim.data.source import find_bad_files, open_index, overlaps
from fastmim.data.survey import survey, warn
from fastmim.data.synthetic import NUM_IMAGES, SyntheticLoader
from fastmim.data.worker import EncodedDataset, ImageDataset
from fastmim.wording import install_extra

LOADERS = ("auto", "dali", "torchvision", "pil", "synthetic")
_LOG = logging.getLogger("fastmim")


def build_loader(
    *,
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    index: ImageIndex | None = None,
    weights: Sequence[float] | None = None,
    file_list: str | os.PathLike[str] | None = None,
    val_fraction: float | None = None,
    follow_links: bool = False,
    component: str | None = None,
    img_size: tuple[int, int],
    in_chans: int = 3,
    micro_batch_size: int,
    grad_accum_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    loader: str = "auto",
    num_workers: int = 2,
    train: bool = True,
    scale: Sequence[float] = (0.67, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    interpolation: str = "bilinear",
    views: Sequence[View] | None = None,
    max_bad_fraction: float = 0.5,
    verify: str = "auto",
    min_size: int = 8,
    rot90: bool = False,
    device: torch.device | str = "cpu",
    field: str = "data.path",
    **reading: Any,
) -> Any:
    """Open a folder, a file list or tar shards of images for pretraining (train=True) or validation.

    Args:
        path: folder of images, searched recursively, or shards (``shards.py``); with `file_list`, what its entries
            are relative to. Several of them are one set of images, in this order.
        index: those of `path` and `file_list` that :func:`~fastmim.data.source.open_index` has listed already; or
            without these any images, or some of them.
        weights: of several: the share of the training samples that each gives; None: by its number of images.
        val_fraction: the share of the images that train=False reads and train=True leaves out (``held_out.py``);
            None: each reads all.
        follow_links: follow linked folders and files out of `path`.
        component: which member of a sample of a shard is the image, such as "jpg" (``shards.py``).
        img_size, in_chans: (H, W) of the batches in pixels; 1 grey, 3 RGB, 4 RGBA, with pixels="float32" any bands.
        micro_batch_size: images per rank and micro-batch.
        loader: one of :data:`LOADERS`; see :func:`choose_loader`.
        num_workers: worker processes; 0 works in the calling process. Also the threads of DALI's CPU operators.
        train: shuffle, crop and flip; else file order, resize and centre crop.
        scale, ratio: range of the crop's area (fraction of the image) and of its aspect (width / height).
        hflip: probability of the horizontal flip.
        rot90: turn by quarter turns (training, square crops).
        views: instead of `img_size`, `rot90` and `scale` to `interpolation`: several crops an image, in MultiBatch.
            With train=False only the size, interpolation and margin of the first count.
        max_bad_fraction: stop when more than this fraction of the files cannot be used.
        verify: "full" decodes every file first, "none" none, "auto" up to 2000 files.
        min_size: images with a shorter side below this many pixels are bad.
        field: the config key that messages about `path` name.
        reading: how a file is read, further arguments of :func:`~fastmim.data.decode.decode_image`. With
            pixels="float32" batches are float32, normalised by `mean` and `std`, and NaN marks no data.

    Returns:
        A Loader, or a SyntheticLoader, which has the same methods.

    Raises:
        ValueError: in one line, for every wrong argument, a missing or empty folder, too many bad files.
    """
    device = torch.device(device)
    if views is None:
        size = tuple(int(edge) for edge in img_size)
        views = [View(size, 1, tuple(scale), tuple(ratio), hflip, interpolation, rot90=rot90)]  # type: ignore[arg-type]
    check_views(views)
    if not train:
        views = [replace(views[0], count=1)]  # held-out images: one centre crop
    if num_workers < 0:
        raise ValueError(f"data.num_workers={num_workers}: must not be negative")
    policies = {view.auto_augment for view in views if view.auto_augment is not None}
    pixels = reading.get("pixels", "uint8")
    own = _off_dali(pixels, views, policies)
    chosen, why = choose_loader(loader, device=device, in_chans=in_chans, train=train, off_dali=own)
    for policy in policies:
        check_augmentation(policy, in_chans, pixels)
    if chosen == "synthetic" and not train and (path, index, val_fraction) != (None, None, None):
        chosen = "torchvision"  # held-out images that are there are read
    decoder = "pil" if chosen == "pil" else "auto"
    if chosen == "synthetic":
        check_reading(**checked(reading))
    else:
        check_decode_options(in_chans, decoder, **checked(reading))
        if index is None:
            index = open_index(
                path, file_list, follow_links=follow_links, component=component, pixels=pixels, field=field
            )
        if val_fraction is not None:
            _refuse_overlaps(path, val_fraction)
            index = split(index, val_fraction, held_out=not train)
    spans = weighted_spans(index, weights) if index is not None and train else None
    order = EpochOrder(
        num_images=NUM_IMAGES if index is None else len(index),
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
        train=train,
        spans=spans,
    )
    if index is None:
        if len(views) > 1 or views[0].count > 1:
            raise ValueError("data.loader=synthetic: makes one crop an image; give one View")
        return SyntheticLoader(order, img_size=views[0].size, in_chans=in_chans, pixels=pixels, device=device)
    if loader == "auto" and train:
        _LOG.info("data.loader=auto: %s (%s)", chosen, why)
    values: dict[str, Any] = dict(in_chans=in_chans, min_size=min_size, **reading)
    bad = find_bad_files(index, verify=verify, loader=decoder, **values)
    if rank == 0:
        warn(survey(index, bad, loader=decoder, **values))
    options: dict[str, Any] = dict(views=views, seed=seed, decoder=decoder, train=train, spans=spans, **values)
    shared: dict[str, Any] = dict(num_workers=num_workers, device=device, bad=bad, max_bad_fraction=max_bad_fraction)
    if chosen == "dali":
        encoded = EncodedDataset(index, frozenset(bad), **options)
        return dali.DaliLoader(encoded, order, num_threads=max(1, num_workers), **shared)
    return Loader(ImageDataset(index, frozenset(bad), **options), order, **shared)


def _refuse_overlaps(path: Any, val_fraction: float) -> None:
    """An image that is reached by two names could be held out by one and trained on by the other."""
    paths = [] if path is None or isinstance(path, (str, os.PathLike)) else [os.fspath(one) for one in path]
    for inner, outer in overlaps(paths):
        raise ValueError(
            f"data.val_fraction={val_fraction:g}: what is in {inner} is in {outer} too, and could be held out of one"
            " alone; take one of them out of data.path, or give data.val_path instead"
        )


def _off_dali(pixels: str, views: Sequence[View], policies: set[str]) -> str:
    """What is asked for and DALI cannot do here, in words; nothing: an empty text."""
    if policies:
        return "objective.auto_augment runs on the host"
    if pixels == "float32":
        return "data.pixels=float32 is decoded on the host"
    return "data.rot90 is done on the host" if any(view.rot90 for view in views) else ""


def choose_loader(
    loader: str, *, device: torch.device, in_chans: int = 3, train: bool = True, off_dali: str = ""
) -> tuple[str, str]:
    """The loader that `loader` means on this machine, and why. `off_dali`: why it cannot be DALI here, if so.

    "auto" is DALI where images go to a GPU and DALI is installed, else torchvision, which is faster than DALI on a
    CPU (benchmarks/bench_data.py). Held-out images are always read by torchvision: a validation loss must not
    depend on the loader. "pil" is the torchvision loader with every image decoded by PIL.

    Raises:
        ValueError: unknown; or DALI is asked for and not installed, or cannot give this many channels.
    """
    if loader not in LOADERS:
        raise ValueError(f"data.loader={loader!r}: unknown; use one of {', '.join(LOADERS)}")
    if loader == "dali":
        if not dali.have_dali():
            raise ValueError(f"data.loader=dali: DALI is not installed: {install_extra('dali')}; or use torchvision")
        if in_chans not in (1, 3):
            raise ValueError(f"data.loader=dali: model.in_chans={in_chans}: DALI gives 1 or 3; use torchvision")
        if off_dali and train:
            raise ValueError(f"data.loader=dali: {off_dali}; use torchvision, or leave that out")
    why = "as given"
    if loader == "auto":
        loader, why = _fastest(device, in_chans, off_dali)
    if loader == "dali" and not train:
        return "torchvision", "held-out images are read alike everywhere"
    return loader, why


def _fastest(device: torch.device, in_chans: int, off_dali: str) -> tuple[str, str]:
    if off_dali:
        return "torchvision", off_dali
    if device.type != "cuda":
        return "torchvision", "the fastest on a CPU"
    if in_chans not in (1, 3):
        return "torchvision", f"DALI does not give {in_chans} channels"
    if not dali.have_dali():
        return "torchvision", f"DALI is not installed: {install_extra('dali')}"
    return "dali", "decodes on the GPU"
