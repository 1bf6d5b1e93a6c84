"""What a classifier gets right on held-out images: overall, by class, and how well its confidence is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmim.evaluate.figure import empty_figure
from fastmim.files import replacing

BINS = 15
"""Of confidence, as Guo et al. 2017 have them."""
_NAMED = 40


class Counts:
    """Sums over images, on their device; of several ranks those add up.

    Args:
        classes: how many.
        device: of the logits.
    """

    headline = "val_top1"
    """The score by which the best of several validations is known."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch: (B, K) logits and (B,) integer labels."""
        log_p = logits.double().log_softmax(1)
        confidence, said = log_p.exp().max(1)
        right = said == labels
        classes = len(self.confusion)
        best = logits.topk(min(5, classes), dim=1).indices
        top5 = (best == labels[:, None]).any(1)
        pairs = torch.bincount(labels * classes + said, minlength=classes**2)
        self.confusion += pairs.view(classes, classes)
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        for row, value in enumerate((torch.ones_like(confidence), confidence, right.double())):
            self.bins[row].index_add_(0, place, value)
        loss = -log_p.gather(1, labels[:, None]).sum()
        self.sums += torch.stack((loss, top5.sum().double(), loss.new_tensor(len(labels))))

    def reduce(self) -> int:
        """Take what all ranks have counted; every rank calls it. Returns the number of images."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (self.confusion, self.bins, self.sums):
                dist.all_reduce(tensor)
        return int(self.sums[2])

    def scores(self) -> dict[str, float]:
        """``val_loss`` (cross-entropy), ``val_top1``, ``val_top5`` as shares, ``val_ece``.

        The last is the expected calibration error: over bins of confidence, the mean distance of accuracy and
        confidence, by their images (Guo et al. 2017, equation 3).
        """
        loss, top5, count = self.sums.tolist()
        gaps = (self.bins[1] - self.bins[2]).abs().sum() / max(count, 1)
        top1 = self.confusion.diagonal().sum() / max(count, 1)
        return {"val_loss": loss / count, "val_top1": float(top1), "val_top5": top5 / count, "val_ece": float(gaps)}

    def table(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each class its images, recall, precision, and the class that it is most often taken for."""
        rows = []
        for k, name in enumerate(names):
            count, said = self.confusion[k].sum(), self.confusion[:, k].sum()
            others = self.confusion[k].clone()
            right, others[k] = float(others[k]), 0
            row: dict[str, Any] = {"class": name, "images": int(count)}
            row["recall"] = right / float(count) if count else None
            row["precision"] = right / float(said) if said else None
            row["taken_for"] = names[int(others.argmax())] if others.sum() else None
            rows.append(row)
        return rows


    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Everything, for ``classes.json``."""
        return {"scores": self.scores(), "classes": self.table(names)}


def save_confusion(counts: Counts, names: Sequence[str], path: Path) -> Path | None:
    """Draw the shares of each class' images by what they were taken for, and accuracy over confidence.

    Returns:
        The path, or None where matplotlib is not installed (a warning says so).
    """
    figure = empty_figure((11, 5), "confusion picture")
    if figure is None:
        return None
    left, right = figure.subplots(1, 2)
    _matrix(left, counts.confusion.cpu(), names, figure)
    _reliability(right, counts.bins.cpu())
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _matrix(axes: Any, confusion: Tensor, names: Sequence[str], figure: Any) -> None:
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axes, label="share of the class' images")
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")


def _reliability(axes: Any, bins: Tensor) -> None:
    count, confidence, right = bins
    some = count > 0
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey", label="calibrated")
    axes.plot((confidence / count)[some].numpy(), (right / count)[some].numpy(), "o-", label="held-out images")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
