"""Linear probes on frozen features: classifiers of all rates and sets of features at once, as one batched product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.evaluate.directions import DIRECTIONS
from fastmim.evaluate.protocols import Protocol

_BATCH_NORM_EPS = 1e-6
_WEIGHT_STD = 0.01
# Logits of test images held at once.
_CHUNK = 1 << 24


class Way(NamedTuple):
    """Training images, cut in one way."""

    features: Sequence[Tensor]
    """Of each set (N, D), float32."""
    labels: Tensor
    """(N,) int64."""


class Classifier(NamedTuple):
    """What one of them has reached."""

    features: int
    """The set of features that it reads, from 0."""
    rate: float
    """Learning rate per 256 images."""
    top1: float
    """Per cent."""
    top5: float


class Probe(nn.Module):
    """S × R linear classifiers on S sets of features of (up to) D channels; all start alike.

    Args:
        widths: channels of each set; what a set has less than the widest is zero, and stays so.
        rates: how many classifiers read each set.
        classes: logits of each.
        batch_norm: features are normalised first, without learnt scale, as in MAE's.
        generator: of the first weights, normal with std 0.01; biases are zero.
    """

    def __init__(
        self, widths: Sequence[int], rates: int, classes: int, *, batch_norm: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        count, wide = len(widths), max(widths)
        first = torch.randn(wide, 1, classes, generator=generator) * _WEIGHT_STD
        inside = torch.arange(wide) < torch.tensor(widths)[:, None]
        weight = (first * inside[:, :, None, None]).expand(count, wide, rates, classes)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(count, 1, rates, classes), requires_grad=False)
        self.norm = nn.BatchNorm1d(count * wide, eps=_BATCH_NORM_EPS, affine=False) if batch_norm else None

    def inputs(self, features: Tensor) -> Tensor:
        """(S, B, D), normalised by the batch in training and by running averages in evaluation."""
        if self.norm is None:
            return features
        sets, batch, width = features.shape
        flat: Tensor = self.norm(features.transpose(0, 1).reshape(batch, -1))
        return flat.view(batch, sets, width).transpose(0, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(S, B, D) → (S, B, R, C) logits."""
        sets, batch, _ = inputs.shape
        product = torch.baddbmm(self.bias.flatten(2), inputs, self.weight.flatten(2))
        return product.view(sets, batch, *self.weight.shape[2:])

    def gradients(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Of each classifier's mean cross-entropy, (softmax - one-hot) / B, to its weight and bias."""
        error = self(inputs).softmax(-1)
        rows = torch.arange(len(labels), device=labels.device)
        error[:, rows, :, labels] -= 1
        error /= len(labels)
        return [(inputs.mT @ error.flatten(2)).view_as(self.weight), error.sum(1, keepdim=True)]


@torch.no_grad()
def linear_probe(
    protocol: Protocol,
    train: Sequence[Way],
    test: Sequence[Tensor],
    truth: Tensor,
    *,
    classes: int,
    seed: int = 0,
    epochs: int | None = None,
) -> list[Classifier]:
    """Train the protocol's classifiers and look at them; the order of images depends on the seed alone.

    Args:
        protocol: optimiser, rates, batch, length.
        train: epoch e reads the one of number e modulo their count; all are of as many images.
        test, truth: features (M, D) of each set, and (M,) classes, of the images to try it on.
        classes: how many there are.
        seed: of first weights and order.
        epochs: instead of the protocol's.

    Returns:
        Of each classifier, set after set, the accuracy after the last epoch.
    """
    ways, wanted = [(_stack(way.features), way.labels) for way in train], _stack(test)
    generator = torch.Generator().manual_seed(seed)
    widths, rates = [features.shape[1] for features in test], protocol.rates
    probe = Probe(widths, len(rates), classes, batch_norm=protocol.batch_norm, generator=generator).to(wanted.device)
    params = [probe.weight, probe.bias]
    direction = DIRECTIONS[protocol.optimizer](params, protocol.weight_decay)
    count, length = len(train[0].labels), epochs or protocol.epochs
    batch = min(protocol.batch, count)
    scaled = torch.tensor(rates, device=wanted.device).view(1, 1, -1, 1) * (batch / 256)
    for epoch in range(length):
        features, labels = ways[epoch % len(ways)]
        order = torch.randperm(count, generator=generator).to(labels.device)
        for step, chosen in enumerate(order[: count // batch * batch].split(batch)):
            at = epoch if protocol.by_epoch else epoch + step / (count // batch)
            grads = probe.gradients(probe.inputs(features[:, chosen]), labels[chosen])
            for param, along in zip(params, direction(params, grads), strict=True):
                param.sub_(scaled * _factor(protocol, at, length) * along)
    return _accuracies(protocol, probe.eval(), wanted, truth)


def _stack(sets: Sequence[Tensor]) -> Tensor:
    """(S, N, D), narrower ones filled up with zeros."""
    wide = max(features.shape[1] for features in sets)
    return torch.stack([F.pad(features, (0, wide - features.shape[1])) for features in sets])


def _factor(protocol: Protocol, epoch: float, epochs: int) -> float:
    """Share of the rate at a (fractional) epoch: linear warm-up from 0, then half a cosine to 0."""
    warm = min(protocol.warmup_epochs, epochs // 2)
    if epoch < warm:
        return epoch / warm
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warm) / (epochs - warm))


def _accuracies(protocol: Protocol, probe: Probe, features: Tensor, truth: Tensor) -> list[Classifier]:
    sets, count = features.shape[:2]
    _, _, rates, classes = probe.weight.shape
    hits = torch.zeros(sets, rates, 2, dtype=torch.int64, device=features.device)
    rows = max(1, _CHUNK // (sets * rates * classes))
    for start in range(0, count, rows):
        logits = probe(probe.inputs(features[:, start : start + rows]))
        right = logits.topk(min(5, classes), -1).indices == truth[start : start + rows, None, None]
        hits += torch.stack((right[..., 0].sum(1), right.any(-1).sum(1)), -1)
    table = (100 * hits.double() / count).tolist()
    return [
        Classifier(i, rate, *table[i][j]) for i in range(sets) for j, rate in enumerate(protocol.rates)
    ]
