"""What frozen features are worth: k-NN, RankMe and linear probes of an objective's encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmim.evaluate.all_rows import all_rows
from fastmim.evaluate.knn import NEIGHBOURS, knn_accuracy
from fastmim.evaluate.linear import Classifier, Way, linear_probe
from fastmim.evaluate.protocols import PROTOCOLS, Protocol, natural_pool
from fastmim.evaluate.rank import rankme
from fastmim.evaluate.validation import evaluating, in_step
from fastmim.models.features import Pooled

QUICK_NEIGHBOURS = 20
"""k of the accuracy during pretraining."""


class Report(NamedTuple):
    """What :func:`probe` has found; accuracies in per cent."""

    train_images: int
    test_images: int
    classes: int
    pool: str
    knn: dict[int, tuple[float, float]]
    """(top-1, top-5) for each k."""
    rankme: float
    width: int
    """Channels of the features of the two above."""
    linear: list[Classifier]
    """Of the protocol; empty without one."""


def features(
    objective: Any,
    batches: Iterable[Any],
    wanted: Sequence[tuple[int, bool]],
    *,
    autocast: AbstractContextManager[Any] | None = None,
    collective: bool = False,
) -> tuple[Tensor, list[list[Pooled]]]:
    """Features of the exported encoder, of the images of all ranks, in the order of their sample ids, on every rank.

    Args:
        objective: its ``exported()`` encoder and its statistics.
        batches: with ``images`` (B, C, H, W) and ``sample_ids`` (B,), this rank's share.
        wanted: (last, normed) of each call of ``encoder.features``.
        autocast: precision of the forward pass.
        collective: a forward pass needs all ranks (ZeRO-3).

    Returns:
        (N,) sample ids, and for each of ``wanted`` its blocks, float32.

    Raises:
        ValueError: no rank has an image.
    """
    look, device = _Look(objective, wanted, autocast), objective.mean.device
    blank = torch.zeros(1, objective.in_chans, *objective.img_size, dtype=torch.uint8, device=device)
    filler = blank, torch.zeros(1, dtype=torch.int64, device=device)
    with evaluating(objective):
        if collective:
            rows = [(ids[:count], look(images)[:count]) for images, ids, count in in_step(batches, filler)]
        else:
            rows = [(ids, look(images)) for images, ids in batches]
            rows = rows or [(filler[1][:0], look(blank)[:0])]
    ids, table = _gathered(torch.cat([one for one, _ in rows]), torch.cat([one for _, one in rows]))
    if not len(ids):
        raise ValueError("no readable image there; give another folder")
    parts = iter(table.split(look.widths, 1))
    return ids, [[Pooled(next(parts), next(parts)) for _ in range(last)] for last, _ in wanted]


class _Look:
    """All that is wanted of an image, side by side: (B, sum of widths)."""

    def __init__(self, objective: Any, wanted: Sequence[tuple[int, bool]], autocast: Any) -> None:
        self.objective, self.wanted, self.autocast = objective, wanted, autocast
        self.widths: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        encoder = self.objective.exported()
        with self.autocast or nullcontext():
            images = self.objective.normalise(images)
            parts = [part for how in self.wanted for one in encoder.features(images, *how) for part in one]
        self.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)


def _gathered(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all ranks by their ids, on every rank."""
    ids, table = all_rows(ids), all_rows(table)
    order = ids.argsort()
    return ids[order], table[order]


def pooled(objective: Any, found: Pooled, pool: str | None = None) -> Tensor:
    """(N, D) what stands for each image: "cls" or "mean"; None: as pretraining has it."""
    chosen: Tensor = getattr(found, pool or natural_pool(objective.exported()))
    return chosen


def quick_probe(
    objective: Any, batches: Iterable[Any], labels: Tensor, held_out: Tensor, *, classes: int, **how: Any
) -> dict[str, float]:
    """``knn_top1``, of the 20 nearest training images, and ``rankme``: what is watched during pretraining.

    Args:
        objective, batches, how: as of :func:`features`; sample ids are places in ``labels``.
        labels, held_out: (N,) int64 and bool, of every image.
        classes: how many there are.
    """
    ids, [[last]] = features(objective, batches, [(1, True)], **how)
    vectors = pooled(objective, last)
    sides = _sides(vectors, ids, labels, held_out)
    near = [min(QUICK_NEIGHBOURS, len(sides[0]))]
    knn = knn_accuracy(*sides, classes=classes, neighbours=near)
    return {"knn_top1": knn[near[0]][0], "rankme": rankme(vectors)}


def _sides(rows: Tensor, ids: Tensor, labels: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of images to learn from, their classes, and the same of those to try it on."""
    labels, tried = (of_all[ids.cpu()].to(ids.device) for of_all in (labels, held_out))
    if not (~tried).any() or not tried.any():
        raise ValueError("no readable image is left to learn from, or to try it on")
    return rows[~tried], labels[~tried], rows[tried], labels[tried]


def probe(
    objective: Any,
    images: Any,
    load: Callable[..., Any],
    *,
    protocol: str | None = "dino",
    epochs: int | None = None,
    augment: int = 0,
    pool: str | None = None,
    seed: int = 0,
) -> Report:
    """k-NN for 10, 20, 100 and 200 neighbours, RankMe, and the classifiers of a protocol.

    Args:
        objective: its ``exported()`` encoder is looked at.
        images: a :class:`fastmim.data.labelled.LabelledImages`.
        load: makes a loader of them; ``load(augmented=True)`` one with random crops of those to learn from.
        protocol: of :data:`PROTOCOLS`; None: no linear probe.
        epochs: instead of the protocol's.
        augment: passes over the training images with random crops, which the classifiers read in turn; 0: one with
            the centre crop. (The references cut anew in every epoch.)
        pool: "cls" or "mean": what stands for an image; None: :func:`~fastmim.evaluate.protocols.natural_pool`.
        seed: of the classifiers' first weights and order.
    """
    encoder = objective.exported()
    pool, plan = pool or natural_pool(encoder), None if protocol is None else PROTOCOLS[protocol]
    wanted = [(1, True)] if plan is None else [(1, True), plan.blocks(encoder)]
    with closing(load()) as loader:
        ids, [[last], *rest] = features(objective, loader.epoch(0), wanted)
    vectors = pooled(objective, last, pool)
    sides = _sides(vectors, ids, images.labels, images.held_out)
    knn = knn_accuracy(*sides, classes=len(images.classes), neighbours=NEIGHBOURS)
    linear: list[Classifier] = []
    if plan is not None:
        sets = [_sides(one, ids, images.labels, images.held_out) for one in plan.features(encoder, rest[0], pool)]
        ways = [Way([own for own, *_ in sets], sides[1])]
        if augment:
            ways = list(_augmented(objective, images, load, plan, pool, augment))
        test = [tried for _, _, tried, _ in sets]
        linear = linear_probe(plan, ways, test, sides[3], classes=len(images.classes), seed=seed, epochs=epochs)
    count, classes = len(sides[0]), len(images.classes)
    return Report(count, len(sides[2]), classes, pool, knn, rankme(vectors), vectors.shape[1], linear)


def _augmented(
    objective: Any, images: Any, load: Callable[..., Any], plan: Protocol, pool: str, passes: int
) -> Iterator[Way]:
    encoder, own = objective.exported(), images.labels[~images.held_out]
    with closing(load(augmented=True)) as loader:
        for epoch in range(passes):
            ids, [found] = features(objective, loader.epoch(epoch), [plan.blocks(encoder)])
            yield Way(plan.features(encoder, found, pool), own[ids.cpu() % len(own)].to(ids.device))
