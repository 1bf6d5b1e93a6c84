"""Launches, traffic, saved bytes and modelled time of a MoCo v3 step: ours beside timm's ViT, as the paper writes it.

Forward and backward in CUDA's bf16 autocast on fake tensors, one GPU; nothing is measured. Beside ours stands the
paper's pseudocode: one pass a view through encoder, projector and predictor, two of the momentum encoder.

    python benchmarks/moco_count.py [--width 384] [--batch 64]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks import command  # noqa: E402
from benchmarks.step_count import Count, count_step  # noqa: E402
from fastmim import create_objective  # noqa: E402

HIDDEN, OUT, TEMPERATURE = 4096, 256, 0.2


def ours(size: Mapping[str, Any]) -> nn.Module:
    """fastmim's; a batch alone stands for both crops."""
    encoder = {"name": "vit", "key_bias": True, "abs_pos_embed": "sincos_moco", "init": "moco", **size}
    objective: Any = create_objective("moco", encoder=encoder)
    objective.patch_size = encoder["patch_size"]  # which count_step makes a mask of
    return objective


class Eager(nn.Module):
    """The paper's pseudocode (Chen et al. 2021, algorithm 1) on timm's ViT and torch's modules."""

    def __init__(self, size: Mapping[str, Any]) -> None:
        super().__init__()
        with mock.patch.object(vision_transformer, "calculate_drop_path_rates", lambda rate, depth, **_: [0.0] * depth):
            self.base, self.momentum = (vision_transformer.VisionTransformer(num_classes=0, **size) for _ in range(2))
        widths = [size["embed_dim"], HIDDEN, HIDDEN, OUT]
        self.base.head, self.momentum.head = _mlp(widths), _mlp(widths)
        self.predictor = _mlp([OUT, HIDDEN, OUT])
        self.patch_size = size["patch_size"]
        self.momentum.requires_grad_(False)
        self.base.patch_embed.proj.requires_grad_(False)
        self.base.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        queries = [self.predictor(self.base(view)) for view in (images, images)]
        with torch.no_grad():
            keys = [self.momentum(view) for view in (images, images)]
        return {"loss": _contrast(queries[0], keys[1]) + _contrast(queries[1], keys[0])}


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (wide, out) in enumerate(pairwise(widths), start=2):
        last = i == len(widths)
        layers += [nn.Linear(wide, out, bias=False), nn.BatchNorm1d(out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _contrast(q: Tensor, k: Tensor) -> Tensor:
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits))) * (2 * TEMPERATURE)


def count(size: Mapping[str, Any], batch: int) -> dict[str, Count]:
    """By who does it; ``size`` are timm's arguments of a ViT."""
    how: dict[str, Any] = {"batch": batch, "img_size": size["img_size"]}
    return {"fastmim": count_step(lambda: ours(size), **how), "timm": count_step(lambda: Eager(size), **how)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("moco_count.py", __doc__)
    parser.add_argument("--width", type=command.positive, default=384, help="embed_dim of the ViT/16; 384 is ViT-S")
    parser.add_argument("--batch", type=command.positive, default=64, help="images of a micro-batch")
    options = parser.parse_args(argv)
    size = dict(img_size=224, patch_size=16, embed_dim=options.width, depth=12, num_heads=12)
    print("provider  launches  MB/image  saved MB/image  modelled µs/image (H100, three roofs)")
    for name, one in count(size, options.batch).items():
        numbers = f"{one.megabytes:8.1f}  {one.saved_megabytes:14.1f}  {one.honest():17.1f}"
        print(f"{name:8}  {len(one.counter.launches):8}  {numbers}")
    return 0


if __name__ == "__main__":
    command.exit_with("moco_count.py", main)
