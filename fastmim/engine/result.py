"""What ``train`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class TrainResult:
    """Where a run ended and what it left. Paths are None where nothing was written."""

    steps: int
    loss: float | None
    val_loss: float | None
    output_dir: Path
    val_top1: float | None = None
    """Share of held-out images of which the class is right, of a fine-tuning."""
    val_map: float | None = None
    """Where an image may have several classes, the mean of their average precisions."""
    ema_score: float | None = None
    """The one of these two that there is, of the weights' moving average."""
    knn_top1: float | None = None
    """Per cent, of ``data.labelled_path``."""
    encoder_path: Path | None = None
    picture_path: Path | None = None
    checkpoint_path: Path | None = None
    curve_path: Path | None = None
    images_seen: int = 0
    bad_files: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    stopped_by: int = 0
    """Number of the signal that has interrupted the run."""

    def places(self) -> list[tuple[str, str]]:
        """Names and paths of what there is."""
        found = {
            "encoder": self.encoder_path,
            "pictures": self.picture_path,
            "curve": self.curve_path,
            "metrics": self.output_dir / "metrics.jsonl",
            "checkpoint": self.checkpoint_path,
        }
        return [(name, str(path)) for name, path in found.items() if path is not None]
