"""What a tokenizer does to images: how many of its codes occur, and how near to the images it comes back."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.data import build_loader
from fastmim.evaluate.reconstruct import draw_grid
from fastmim.files import replacing
from fastmim.objectives.dvae import code_map
from fastmim.objectives.pictures import Picture, to_rgb
from fastmim.objectives.tokenizer import Tokenizer, read_tokenizer
from fastmim.wording import plural

SHOWN = 8
"""Images in a picture."""


@dataclass(frozen=True)
class CodeReport:
    """Counts over all images.

    Attributes:
        images: Number.
        codes: Size of the vocabulary.
        counts: (codes,) int64, how often each was the likeliest.
        error: Mean squared error of the pixels in [0, 1] that the codes give back; None without a decoder.
        mean_colour: The same of each image's mean colour.
    """

    images: int
    codes: int
    counts: Tensor
    error: float | None
    mean_colour: float

    @property
    def used(self) -> int:
        """Codes that occur."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the entropy of the codes."""
        return float(torch.special.entr(self.counts / self.counts.sum()).sum().exp())

    def __str__(self) -> str:
        share = f"{self.used} of {self.codes} codes occur ({self.used / self.codes:.0%})"
        colour = f"mean colour {self.mean_colour:.4f}"
        back = "no decoder" if self.error is None else f"squared error {self.error:.4f}"
        return f"{plural(self.images, 'image')}: {share}, perplexity {self.perplexity:.1f}; {back} ({colour})"


@torch.no_grad()
def code_report(tokenizer: Tokenizer, batches: Iterable[Any], shown: int = 0) -> tuple[CodeReport, Picture | None]:
    """Tokenise all images.

    Args:
        tokenizer: Of :func:`~fastmim.objectives.tokenizer.read_tokenizer`.
        batches: With ``images``, (B, C, H, W) uint8.
        shown: Images in the picture.

    Returns:
        The counts, and the first images, what their codes give back, and the codes as colours; None for 0.

    Raises:
        ValueError: There is no image.
    """
    counts = torch.zeros(tokenizer.codes, dtype=torch.int64)
    images, sums, columns = 0, torch.zeros(2, dtype=torch.float64), []
    for batch in batches:
        pixels = batch.images.float() / 255
        ids = tokenizer(pixels)
        counts += ids.flatten().bincount(minlength=tokenizer.codes).cpu()
        back = tokenizer.pixels(ids) if tokenizer.decodes else None
        guesses = [pixels.mean((2, 3), keepdim=True)] + ([] if back is None else [back])
        for i, guess in enumerate(guesses):
            sums[i] += (guess - pixels).square().flatten(1).mean(1).sum().double().cpu()
        if images < shown:
            drawn = [pixels] if back is None else [pixels, back]
            columns.append([*(to_rgb(one).cpu() for one in drawn), code_map(ids, tokenizer.patch_size)])
        images += len(pixels)
    if not images:
        raise ValueError("no image can be read there")
    error = float(sums[1]) / images if tokenizer.decodes else None
    report = CodeReport(images, tokenizer.codes, counts, error, float(sums[0]) / images)
    if not columns:
        return report, None
    headings = ("image", "reconstruction", "codes") if tokenizer.decodes else ("image", "codes")
    joined = [torch.cat(parts)[:shown] for parts in zip(*columns, strict=True)]
    return report, Picture(headings, joined)


def report_on_folder(tokenizer: str | Path, folder: str | Path, *, picture: str | Path | None = None) -> CodeReport:
    """:func:`code_report` of a tokenizer's file on the middle squares of a folder of images.

    Args:
        tokenizer: See :func:`~fastmim.objectives.tokenizer.read_tokenizer`.
        folder: Nested or flat, or tar shards.
        picture: A PNG to draw, of :data:`SHOWN` images.

    Raises:
        ValueError: One of them cannot be read.
    """
    read = read_tokenizer(tokenizer)
    how: dict[str, Any] = dict(img_size=read.model.img_size, in_chans=read.in_chans, micro_batch_size=8)
    how |= dict(train=False, num_workers=0, verify="none", field="DIR")
    with closing(build_loader(path=folder, **how)) as loader:
        report, drawn = code_report(read, loader.epoch(0), shown=SHOWN if picture else 0)
    if picture is not None and drawn is not None:
        with replacing(Path(picture)) as partial:
            draw_grid(drawn).save(partial, format="PNG")
    return report
