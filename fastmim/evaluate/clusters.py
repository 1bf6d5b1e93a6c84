"""Clusters of the colours of images, for SimMIM's and iGPT's target of them: fitted in one pass, and a file of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from fastmim._version import __version__
from fastmim.data import build_loader
from fastmim.files import replacing
from fastmim.models import encoder_settings
from fastmim.models.layers import to_pair
from fastmim.objectives.clusters import CENTRES
from fastmim.wording import install_packages, plural

CLUSTERS = 512
"""Of iGPT (Chen et al. 2020, section 2.2) and SimMIM (section 3.4)."""
PER_IMAGE = 4096
"""Pixels that are drawn of each image."""
_AT_ONCE = 1 << 16
"""Pixels of a step of the clustering; more where there are many clusters."""
_SAMPLED = 1 << 10
"""Pixels of a step, or some more, on which the result is judged."""


@dataclass(frozen=True)
class ClusterReport:
    """What came of it.

    Attributes:
        images, pixels: That were read, and used.
        centres: (K, C) float32 colours in [0, 1], the darkest first.
        used: Centres that are the nearest of a pixel of a sample of those.
        error: Root of the mean squared distance of this sample's values from their centre's, in [0, 1].
    """

    images: int
    pixels: int
    centres: np.ndarray
    used: int
    error: float

    def __str__(self) -> str:
        what = f"{len(self.centres)} clusters of {plural(self.pixels, 'pixel')} of {plural(self.images, 'image')}"
        return f"{what}, {self.used} of them in use; root mean square error of a value {self.error * 255:.1f} of 255"


def fit_clusters(
    batches: Iterable[Any],
    clusters: int = CLUSTERS,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> ClusterReport:
    """k-means of the colours of some pixels of every image, many images at a time (scikit-learn's MiniBatchKMeans).

    Args:
        batches: With ``images``, (B, C, H, W) uint8.
        clusters: Of colours; 2 or more.
        seed: Of the pixels that are drawn, and of the first centres.
        progress: Told of the images so far.

    Raises:
        ValueError: scikit-learn is not installed, or there are too few pixels.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise ValueError(f"clusters: scikit-learn is not installed; {install_packages('scikit-learn')}") from None
    if clusters < 2:
        raise ValueError(f"--clusters {clusters}: must be at least 2, for example {CLUSTERS}")
    means = MiniBatchKMeans(clusters, random_state=seed, n_init=3)
    images, pixels, sample = 0, 0, []
    for count, colours in _steps(batches, max(_AT_ONCE, 32 * clusters), seed):
        if len(colours) < clusters and not pixels:
            raise ValueError(f"--clusters {clusters}: these images have {plural(len(colours), 'pixel')}; use fewer")
        means.partial_fit(colours)
        sample.append(colours[:: max(1, len(colours) // _SAMPLED)])
        if len(sample) * _SAMPLED > _AT_ONCE * 4:
            sample = sample[::2]
        images, pixels = images + count, pixels + len(colours)
        progress(images)
    if not images:
        raise ValueError("no image can be read there")
    centres = means.cluster_centers_
    centres = np.clip(centres[np.argsort(centres.mean(1), kind="stable")], 0, 1).astype(np.float32)
    seen = np.concatenate(sample)
    nearest = means.predict(seen)
    distance = np.square(means.cluster_centers_[nearest] - seen).mean()
    return ClusterReport(images, pixels, centres, len(np.unique(nearest)), math.sqrt(distance))


def _steps(batches: Iterable[Any], at_once: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers of images, and (n, C) colours in [0, 1] of pixels drawn from them, ``at_once`` or some more."""
    generator = torch.Generator().manual_seed(seed)
    images, held = 0, []
    for batch in batches:
        held.append(_drawn(batch.images, generator))
        images += len(batch.images)
        if sum(map(len, held)) >= at_once:
            yield images, torch.cat(held).numpy()
            images, held = 0, []
    if held:
        yield images, torch.cat(held).numpy()


def _drawn(images: Tensor, generator: torch.Generator) -> Tensor:
    """(n, C) colours in [0, 1] of (B, C, H, W) uint8 images."""
    flat = images.cpu().flatten(2).transpose(1, 2)
    keep = torch.rand(flat.shape[:2], generator=generator).argsort(1)[:, :PER_IMAGE]
    return flat.gather(1, keep[..., None].expand(-1, -1, flat.shape[2])).flatten(0, 1).float() / 255


def write_clusters(
    path: str | Path,
    out: str | Path,
    *,
    clusters: int = CLUSTERS,
    encoder: Mapping[str, Any],
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **reading: Any,
) -> ClusterReport:
    """:func:`fit_clusters` of a crop of every image, as in training, and the file that ``objective.clusters`` names.

    Args:
        path: Folder of images, nested or flat, or tar shards.
        out: The safetensors file: the centres, and in its header where they come from.
        encoder: Of which the size and the channels of images are taken.
        reading: See :func:`fastmim.data.build_loader`.
        progress: Told of the stage, the images so far, and their number.

    Raises:
        ValueError: See :func:`fit_clusters`, or the images cannot be read.
        OSError: ``out`` cannot be written.
    """
    folder = Path(out).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out {out}: there is no folder {folder}; make it first")
    settings = encoder_settings(encoder)
    size, in_chans = to_pair(settings["img_size"], "img_size"), settings["in_chans"]
    # One image a batch: the last ones of an epoch that are no whole batch would be left out.
    how: dict[str, Any] = dict(micro_batch_size=1, num_workers=0, loader="torchvision", verify="none", field="DIR")
    with closing(build_loader(path=path, img_size=size, in_chans=in_chans, seed=seed, **how, **reading)) as loader:
        total = loader.num_images
        told = fit_clusters(
            loader.epoch(0), clusters, seed=seed, progress=lambda images: progress("colours", images, total)
        )
    facts = {"kind": "colour clusters", "clusters": len(told.centres), "in_chans": in_chans, "images": told.images,
             "pixels": told.pixels, "error": told.error, "seed": seed, "version": __version__}  # fmt: skip
    with replacing(Path(out)) as partial:
        save_file({CENTRES: told.centres}, partial, metadata={key: json.dumps(value) for key, value in facts.items()})
    return told
