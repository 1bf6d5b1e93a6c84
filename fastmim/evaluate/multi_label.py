"""What a classifier gets right on held-out images that have several classes each, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.evaluate.all_rows import all_rows

THRESHOLDS = tuple(i / 20 for i in range(1, 20))
"""Of a class' probability, above which it is said."""


class ManyCounts:
    """Scores and labels of all images, on their device.

    Args:
        classes: how many.
        device: of the logits.
    """

    headline = "val_map"
    """The score by which the best of several validations is known."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.logits = torch.zeros(0, classes, device=device)
        self.labels = torch.zeros(0, classes, dtype=torch.bool, device=device)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch: (B, K) logits, and (B, K) labels, 1 for each class of an image."""
        self._parts.append((logits.float(), labels.bool()))

    def reduce(self) -> int:
        """Take what all ranks have; every rank calls it. Returns the number of images."""
        parts = [(self.logits, self.labels), *self._parts]
        self.logits, self.labels = (all_rows(torch.cat(column)) for column in zip(*parts, strict=True))
        self._parts = []
        return len(self.logits)

    def scores(self) -> dict[str, float]:
        """``val_loss`` (mean binary cross-entropy), ``val_map`` (:func:`average_precision`, the mean over classes that
        have an image), ``val_f1`` (of all pairs of image and class, at the threshold 0.5)."""
        loss = F.binary_cross_entropy_with_logits(self.logits.double(), self.labels.double())
        found = average_precision(self.logits, self.labels)
        mean = found[~found.isnan()].mean().nan_to_num()
        micro = rates(self.logits.sigmoid() > 0.5, self.labels, None)
        return {"val_loss": float(loss), "val_map": float(mean), "val_f1": float(micro[2])}

    def table(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each class its images, average precision, precision, recall and F1 at 0.5, and the threshold of
        :data:`THRESHOLDS` with the highest F1; None where they have no meaning."""
        precision, recall, f1 = (one.tolist() for one in rates(self.logits.sigmoid() > 0.5, self.labels, 0))
        by_threshold = torch.stack([rates(self.logits.sigmoid() > t, self.labels, 0)[2] for t in THRESHOLDS])
        best, found = by_threshold.argmax(0).tolist(), average_precision(self.logits, self.labels).tolist()
        rows = []
        for k, (name, images) in enumerate(zip(names, self.labels.sum(0).tolist(), strict=True)):
            row: dict[str, Any] = {"class": name, "images": images, "ap": found[k] if images else None}
            row |= {"precision": precision[k], "recall": recall[k] if images else None, "f1": f1[k]}
            row["best_threshold"] = THRESHOLDS[best[k]] if images else None
            rows.append(row)
        return rows

    def thresholds(self) -> list[dict[str, float]]:
        """Of each threshold precision, recall and F1 over all pairs of image and class, and the mean F1 of classes."""
        rows = []
        for threshold in THRESHOLDS:
            said = self.logits.sigmoid() > threshold
            precision, recall, f1 = (float(one) for one in rates(said, self.labels, None))
            row = {"threshold": threshold, "precision": precision, "recall": recall, "f1": f1}
            rows.append(row | {"mean_f1": float(rates(said, self.labels, 0)[2].mean())})
        return rows

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Everything, for ``classes.json``."""
        return {"scores": self.scores(), "classes": self.table(names), "thresholds": self.thresholds()}


def rates(said: Tensor, labels: Tensor, dim: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of (N, K) bool predictions; 0 where nothing is said, or there is nothing to find.

    Args:
        said: what is predicted.
        labels: what is true.
        dim: 0: of each class; None: of all pairs together.
    """
    right, claimed, true = ((one.sum(dim) if dim is not None else one.sum()).double()
                            for one in (said & labels, said, labels))  # fmt: skip
    return right / claimed.clamp(min=1), right / true.clamp(min=1), 2 * right / (claimed + true).clamp(min=1)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """The area under the steps of precision over recall, Σ (R_n − R_{n−1})·P_n over falling thresholds.

    Without interpolation, images of equal score together; as scikit-learn's ``average_precision_score``.

    Args:
        scores: (N, K), higher for what is more likely.
        labels: (N, K) bool.

    Returns:
        (K,) float64; NaN for a class without an image.
    """
    order = scores.argsort(0, descending=True)
    ranked, true = scores.gather(0, order), labels.gather(0, order).double()
    found = true.cumsum(0)
    precision = found / torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    # Of equal scores only the last row is a threshold: the images before it count with its precision.
    last = torch.ones_like(labels)
    last[:-1] = ranked[:-1] != ranked[1:]
    places = torch.where(last, torch.arange(len(scores), device=scores.device)[:, None], len(scores) - 1)
    places = places.flip(0).cummin(0).values.flip(0)
    return (true * precision.gather(0, places)).sum(0) / found[-1].where(found[-1] > 0, torch.nan)
