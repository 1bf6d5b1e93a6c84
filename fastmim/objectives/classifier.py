"""What a fine-tuning trains, and the moving average of it: an encoder, pooled tokens and a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import create_encoder
from ..models.layers import trunc_normal_


class Scores(nn.Linear):
    """A linear layer in float32, whatever the precision around it."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight.float(), self.bias.float())


class Classifier(nn.Module):
    """Of normalised images the logits of their classes.

    Attributes:
        encoder: Of any family.
        head: Reads its pooled tokens.
        fc_norm: Of a ViT, the norm of the mean of patches, in place of that of all tokens; else None.
    """

    encoder: Any
    head: Scores
    fc_norm: nn.LayerNorm | None

    def add_head(self, num_classes: int, pool: str) -> None:
        """``head`` and ``fc_norm`` for an encoder that is there; ``pool`` is "mean" or "cls"."""
        width, is_vit = self.encoder.num_features, self.encoder.settings["name"] == "vit"
        self.pool, self.fc_norm = pool, None
        if is_vit and pool == "mean":
            self.fc_norm = nn.LayerNorm(width, eps=self.encoder.norm.eps)
            self.encoder.norm.requires_grad_(False)
        self.encoder.register_parameter("mask_token", None)
        self.head = Scores(width, num_classes)
        trunc_normal_(self.head.weight, std=2e-5 if is_vit else 0.02, bound=2.0)
        nn.init.zeros_(self.head.bias)

    def classify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised → (B, num_classes) float32."""
        scores: Tensor = self.head(self.features(images))
        return scores

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised → (B, D), what the head reads."""
        if self.fc_norm is None:
            cls, patches = self.encoder.forward_tokens(images)
            return cls if self.pool == "cls" else patches.mean((1, 2))
        stream, normed = self.encoder.forward_stream(images)
        # The norm of all tokens is not read. Its gradient, of zeros, has to be there: DeepSpeed's hooks of ZeRO-3 want
        # one for every output of a block, and where blocks are recomputed a weight would be missing without.
        features: Tensor = self.fc_norm(stream[:, 1:].mean(1) + 0 * normed[:, 0])
        return features


class Average(Classifier):
    """The moving average of the weights of another; no gradient reaches it.

    Args:
        of: The other, whose weights it has at first.
        encoder: Keyword arguments that built the other's encoder.
    """

    def __init__(self, of: Classifier, encoder: Mapping[str, Any], impl: str) -> None:
        super().__init__()
        self.encoder = create_encoder({**encoder, "drop_path_rate": 0.0}, impl=impl)
        self.add_head(of.head.out_features, of.pool)
        self.requires_grad_(False)
        self.follow(of)

    @torch.no_grad()
    def follow(self, of: Classifier) -> None:
        """Become equal to it."""
        named = dict(of.named_parameters())
        for name, param in self.named_parameters():
            param.copy_(named[name])


def warm_momentum(decay: float, updates: int) -> float:
    """Share of an average that stays in the update after ``updates`` others: at most (1 + n)/(10 + n).

    So an average of few updates is not of the first weights; the rule is that of TensorFlow's
    ``ExponentialMovingAverage`` (Abadi et al. 2016) and of timm's ``ModelEmaV3``.
    """
    return min(decay, (1 + updates) / (10 + updates))
