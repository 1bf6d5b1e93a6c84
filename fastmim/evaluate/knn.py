"""k-NN accuracy of frozen features, by DINO's protocol (Caron et al. 2021, section 4.1; votes of Wu et al. 2018)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.wording import plural

log = logging.getLogger("fastmim")

NEIGHBOURS = (10, 20, 100, 200)
"""The numbers of neighbours of the protocol."""
TEMPERATURE = 0.07
# Similarities held at once.
_CHUNK = 1 << 24


def usable_neighbours(wanted: Sequence[int], images: int) -> list[int]:
    """The numbers of neighbours that so many training images have, larger ones clipped to all of them, with a word."""
    kept = sorted({min(k, images) for k in wanted})
    if max(wanted) > images:
        there = plural(images, "training image")
        log.warning("k-NN: only %s: k is at most that (%s)", there, ", ".join(map(str, kept)))
    return kept


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, *, classes: int, neighbours: Sequence[int]
) -> Iterator[tuple[slice, dict[int, Tensor]]]:
    """The votes for each class: each of the k nearest training images gives exp(cosine / 0.07) to its own.

    In chunks of test images, so that no table of all similarities is needed; on the device of the features.

    Args:
        train: (N, D) float32 features, of any length.
        labels: (N,) int64 classes of these.
        test: (M, D).
        classes: How many there are.
        neighbours: Each k, at most N.

    Yields:
        Rows of ``test``, and their (rows, classes) votes for each k.
    """
    train, test, most = F.normalize(train, dim=1), F.normalize(test, dim=1), max(neighbours)
    rows = max(1, _CHUNK // len(train))
    for start in range(0, len(test), rows):
        chunk = slice(start, min(start + rows, len(test)))
        similar, nearest = (test[chunk] @ train.T).topk(most, dim=1)
        weights, theirs = (similar / TEMPERATURE).exp(), labels[nearest]
        yield chunk, {
            k: weights.new_zeros(len(weights), classes).scatter_add_(1, theirs[:, :k], weights[:, :k])
            for k in neighbours
        }


def knn_accuracy(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, *, classes: int, neighbours: Sequence[int] = NEIGHBOURS
) -> dict[int, tuple[float, float]]:
    """(top-1, top-5) in per cent for each k; with fewer than five classes the second counts all of them.

    Args:
        truth: (M,) int64 classes of ``test``.

    Other arguments as of :func:`knn_votes`; k is clipped by :func:`usable_neighbours`.
    """
    kept = usable_neighbours(neighbours, len(train))
    hits = {k: torch.zeros(2, dtype=torch.int64, device=test.device) for k in kept}
    for chunk, votes in knn_votes(train, labels, test, classes=classes, neighbours=kept):
        for k, table in votes.items():
            # Many classes may have no vote: of equal ones the first counts, as in the reference.
            ranked = table.sort(dim=1, descending=True, stable=True).indices
            right = ranked[:, :5] == truth[chunk, None]
            hits[k] += torch.stack((right[:, 0].sum(), right.sum()))
    return {k: (100 * first / len(test), 100 * five / len(test)) for k, (first, five) in _numbers(hits).items()}


def _numbers(hits: dict[int, Tensor]) -> dict[int, tuple[int, int]]:
    """Read from the device at once."""
    table = torch.stack(list(hits.values())).tolist()
    return {k: (first, five) for k, (first, five) in zip(hits, table, strict=True)}
