"""Reconstruction loss on held-out images, with the same masks every time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmim.evaluate.classification import Counts
from fastmim.evaluate.multi_label import ManyCounts

ClassCounts = Counts | ManyCounts
"""Of images with one class, or with several."""

# Not the training seed: validation losses of runs with different seeds stay comparable.
MASK_SEED = 1_000_003


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every submodule's mode is put back afterwards."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in training:
            part.training = mode


def validation_loss(
    objective: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    max_batches: int | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    collective: bool = False,
) -> float:
    """Mean loss over held-out images; every rank calls it with its share of them.

    Masks are keyed by the sample id alone, so every image has the same mask in every run and at every step.

    Args:
        objective: the plain objective (not wrapped: ranks may hold different numbers of batches).
        batches: pairs of images (B, C, H, W) and sample_ids (B,), on the objective's device.
        max_batches: micro-batches to use on each rank; None: all.
        autocast: precision of the forward pass.
        collective: a forward pass needs all ranks (ZeRO-3): one that has no images left repeats its last ones,
            uncounted, until all are done.

    Returns:
        The mean over all samples of all ranks.

    Raises:
        ValueError: no rank has an image.
    """
    total = torch.zeros(2, dtype=torch.float64, device=next(objective.parameters()).device)
    with evaluating(objective), autocast or nullcontext():
        for images, sample_ids, count in _chosen(objective, batches, max_batches, collective):
            mask = objective.random_mask(sample_ids, seed=MASK_SEED, epoch=0)
            total[0] += objective(images, mask)["loss"].double() * count
            total[1] += count
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    loss, count = total.tolist()
    if not count:
        raise ValueError("data.val_path: no readable image there; give another folder or leave it out")
    return loss / count


def validation_counts(
    objective: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    max_batches: int | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    collective: bool = False,
) -> dict[str, ClassCounts]:
    """What each of an objective's ``classifiers`` gets right; arguments as of :func:`validation_loss`.

    Args:
        objective: with ``classifiers`` and ``held_out_labels``, see :class:`fastmim.objectives.classify.Classify`.

    Raises:
        ValueError: no rank has an image.
    """
    labels = objective.held_out_labels
    kind = ManyCounts if labels.ndim == 2 else Counts
    counts: dict[str, ClassCounts] = {
        name: kind(objective.num_classes, labels.device) for name in objective.classifiers()
    }
    with evaluating(objective), autocast or nullcontext():
        for images, sample_ids, count in _chosen(objective, batches, max_batches, collective):
            normalised = objective.normalise(images)
            for name, classify in objective.classifiers().items():
                counts[name].add(classify(normalised)[:count], labels[sample_ids[:count]])
    if not all([one.reduce() for one in counts.values()]):
        raise ValueError("data.val_path: no readable image there; give another folder or leave it out")
    return counts


Counted = Iterator[tuple[Tensor, Tensor, int]]


def _chosen(
    objective: Any, batches: Iterable[tuple[Tensor, Tensor]], max_batches: int | None, collective: bool
) -> Counted:
    """The batches of this rank with their number of samples; with ``collective`` as many on every rank."""
    chosen = islice(batches, max_batches)
    if not collective:
        return _counted(chosen)
    device = next(objective.parameters()).device
    return in_step(chosen, (objective.example(1)[0], torch.zeros(1, dtype=torch.int64, device=device)))


def _counted(batches: Iterable[tuple[Tensor, Tensor]]) -> Counted:
    for images, sample_ids in batches:
        yield images, sample_ids, len(images)


def in_step(batches: Iterable[tuple[Any, Tensor]], filler: tuple[Any, Tensor]) -> Iterator[tuple[Any, Tensor, int]]:
    """The batches with their number of samples, on every rank as many as on the rank that has most.

    A rank that has none left repeats its last one, or ``filler`` if it had none, with 0.
    """
    remaining = _counted(batches)
    images, sample_ids = filler
    while True:
        images, sample_ids, count = next(remaining, (images, sample_ids, 0))
        left = torch.tensor(count, device=sample_ids.device)
        dist.all_reduce(left)
        if not int(left):
            return
        yield images, sample_ids, count
