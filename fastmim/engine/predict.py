"""A checkpoint's picture of chosen images under chosen masks: ``fastmim reconstruct``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmim.data import build_loader
from fastmim.data.given import open_given
from fastmim.data.held_out import PartIndex
from fastmim.data.index import ImageIndex
from fastmim.data.reading import KEYS
from fastmim.engine.saved import load_objective
from fastmim.evaluate.given_mask import cell_grid, painted_cells, square_cells
from fastmim.evaluate.reconstruct import draw_image, write_grid
from fastmim.evaluate.validation import evaluating
from fastmim.files import replacing
from fastmim.objectives import Objective
from fastmim.objectives.masks import over_patches
from fastmim.objectives.pictures import COMPOSITE, Picture, check_bands

_BATCH, _QUARTER = 8, 0.25


@dataclass(frozen=True)
class Wanted:
    """Which masks.

    Attributes:
        mask: ``random``, as in training; ``square``; or the path of a picture that is white where images are hidden.
        ratio: area of the square; None: a quarter.
        unit: edge in pixels of the cells that a square or a painted mask is made of; None: a token of the encoder.
        seeds: of random masks; None: 0 alone.
        bands: channels that are drawn, one or three from 1 on; None: as :func:`~fastmim.objectives.pictures.to_rgb`.
    """

    mask: str = "random"
    ratio: float | None = None
    unit: int | None = None
    seeds: Sequence[int] | None = None
    bands: tuple[int, ...] | None = None

    def check(self) -> None:
        """Refuse what would change nothing.

        Raises:
            ValueError: an option is of another kind of mask.
        """
        if self.ratio is not None and self.mask != "square":
            of, fix = "it is the area of a square", "give --mask square too"
            raise ValueError(f"--ratio {self.ratio:g}: {of}, and --mask is {self.mask}; {fix}, or leave --ratio out")
        if self.unit is not None and self.mask == "random":
            of, fix = "of the cells of a square or a painted mask", "give --mask square or a picture too"
            raise ValueError(f"--unit {self.unit}: {of}, and --mask is random; {fix}, or leave --unit out")
        if self.seeds is not None and self.mask != "random":
            shown = " ".join(map(str, self.seeds))
            raise ValueError(f"--seed {shown}: of random masks, and --mask is {self.mask}; leave one of the two out")


@dataclass
class Drawn:
    """What was drawn: ``headings`` of the columns, counts of images and of composites, and the files left out."""

    headings: Sequence[str] = ()
    images: int = 0
    composites: int = 0
    bad_files: dict[str, str] = field(default_factory=dict)


def predict_images(
    checkpoint: str | Path,
    images: Sequence[str | os.PathLike[str]],
    wanted: Wanted,
    *,
    out: str | Path,
    most: int = 0,
    composites: str | Path | None = None,
) -> Drawn:
    """Draw what the objective of a checkpoint makes of images, read as its run's held-out ones are.

    Args:
        checkpoint: see :func:`~fastmim.engine.saved.load_objective`.
        images: files, folders or shards.
        wanted: the masks.
        out: PNG of a row an image and seed.
        most: so many images, evenly spread; 0: all.
        composites: folder for each image completed by its prediction, as a PNG of its own.

    Raises:
        ValueError: a path or a mask cannot be used, or the objective has no such picture, or none that it has learnt.
    """
    wanted.check()
    if most < 0:
        raise ValueError(f"--most {most}: must not be negative; 0 takes all")
    objective, run = load_objective(checkpoint)
    if part := objective.untrained():
        raise ValueError(f"{checkpoint}: {part} has never been trained, and its picture would be noise; train on")
    try:
        check_bands(wanted.bands, objective.in_chans)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    objective.bands = wanted.bands
    given = _chosen_mask(objective, wanted)
    index = open_given(images, component=run.get("data.component"), pixels=run.get("data.pixels", "uint8"))
    if most and most < len(index):
        index = PartIndex(index, np.linspace(0, len(index) - 1, most).astype(np.int64))
    reading = {key: run[f"data.{key}"] for key in (*KEYS, "interpolation") if run.get(f"data.{key}") is not None}
    how: dict[str, Any] = dict(img_size=objective.img_size, in_chans=objective.in_chans, micro_batch_size=_BATCH)
    how |= dict(index=index, train=False, num_workers=0, verify="none", max_bad_fraction=1.0, field="IMAGES", **reading)
    drawn, pictures = Drawn(), []
    with closing(build_loader(**how)) as loader:
        for batch in loader.epoch(0):
            for seed in wanted.seeds or (0,):
                picture = _picture(objective, batch, given, seed)
                pictures.append(picture)
                if composites is not None:
                    drawn.composites += _write_composites(picture, batch.files, index, seed, Path(composites))
            drawn.images += len(batch.images)
        drawn.bad_files = dict(loader.bad_files)
    if not pictures:
        raise ValueError("IMAGES: none of them can be read" + "".join(f"; {why}" for why in drawn.bad_files.values()))
    drawn.headings = pictures[0].headings
    whole = Picture(drawn.headings, [torch.cat(parts) for parts in zip(*(p.columns for p in pictures), strict=True)])
    write_grid(whole, Path(out))
    return drawn


def _chosen_mask(objective: Objective, wanted: Wanted) -> Tensor | None:
    """(1, H/p, W/p) of every image; None: random ones of its own."""
    if wanted.mask == "random":
        return None
    if not bool(objective.random_mask(torch.zeros(1, dtype=torch.int64)).any()):
        raise ValueError(f"--mask {wanted.mask}: {type(objective).__name__} hides nothing; leave it out")
    patch = objective.img_size[0] // objective.encoder.grid[0]
    unit = objective.encoder.stride if wanted.unit is None else wanted.unit
    rows, columns = cell_grid(objective.img_size, unit, patch)
    square = wanted.mask == "square"
    share = _QUARTER if wanted.ratio is None else wanted.ratio
    cells = square_cells(rows, columns, share) if square else painted_cells(wanted.mask, rows, columns)
    return over_patches(cells[None], objective.encoder.grid, unit // patch)


def _picture(objective: Objective, batch: Any, given: Tensor | None, seed: int) -> Picture:
    count = len(batch.images)
    mask = objective.random_mask(batch.sample_ids, seed=seed) if given is None else given.expand(count, -1, -1)
    with evaluating(objective):
        picture = objective.picture(batch.images, mask)
    if picture is None:
        raise ValueError(f"CHECKPOINT: {type(objective).__name__} has no picture")
    return picture


def _write_composites(picture: Picture, files: Tensor, index: ImageIndex, seed: int, folder: Path) -> int:
    """The completed images of a batch under the names of their files."""
    if COMPOSITE not in picture.headings:
        raise ValueError(f"--composites {folder}: the picture has none, only {', '.join(picture.headings)}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in zip(_names(files, index, seed, folder), picture.columns[-1], strict=True):
        with replacing(path) as partial:
            draw_image(image).save(partial, format="PNG")
    return len(files)


def _names(files: Tensor, index: ImageIndex, seed: int, folder: Path) -> Iterator[Path]:
    """Numbered, because the same name may be in two folders, and plain, because names in shards are anybody's."""
    for number in files.tolist():
        stem = os.path.splitext(os.path.basename(os.fsdecode(index.name(number))))[0]
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", stem)[:100]
        yield folder / f"{number:05d}-{plain}{f'-seed{seed}' if seed else ''}.png"
