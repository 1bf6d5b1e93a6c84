"""Accuracy, confusion and calibration against scikit-learn and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from fastmim.evaluate.classification import BINS, Counts, save_confusion
from fastmim.evaluate.multi_label import THRESHOLDS, ManyCounts, average_precision


def drawn(count=500, classes=7):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + 2 * torch.eye(classes)[labels]
    return logits, labels


def test_scores_are_scikit_learns():
    logits, labels = drawn()
    counts = Counts(7)
    for part in range(0, 500, 60):
        counts.add(logits[part : part + 60], labels[part : part + 60])
    scores, said, p = counts.scores(), logits.argmax(1), logits.double().softmax(1)
    assert scores["val_top1"] == pytest.approx(metrics.accuracy_score(labels, said))
    assert scores["val_top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, p, k=5))
    assert scores["val_loss"] == pytest.approx(metrics.log_loss(labels, p))
    np.testing.assert_array_equal(counts.confusion, metrics.confusion_matrix(labels, said))
    recalls = [row["recall"] for row in counts.table("abcdefg")]
    np.testing.assert_allclose(recalls, metrics.recall_score(labels, said, average=None))
    precisions = [row["precision"] for row in counts.table("abcdefg")]
    np.testing.assert_allclose(precisions, metrics.precision_score(labels, said, average=None))


def test_calibration_error_is_the_mean_gap_by_bin():
    logits, labels = drawn()
    p = logits.double().softmax(1).numpy()
    confidence, right = p.max(1), p.argmax(1) == labels.numpy()
    gap = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence >= low) & (confidence < low + 1 / BINS)
        gap += abs(confidence[inside].sum() - right[inside].sum()) / 500
    counts = Counts(7)
    counts.add(logits, labels)
    assert counts.scores()["val_ece"] == pytest.approx(gap)


def test_a_class_that_nobody_names_and_one_without_images(tmp_path):
    counts = Counts(3)
    counts.add(torch.tensor([[5.0, 0, 0], [4.0, 0, 0]]), torch.tensor([0, 1]))
    rows = counts.table(["a", "b", "c"])
    assert rows[0]["recall"] == 1 and rows[1]["taken_for"] == "a" and rows[1]["precision"] is None
    assert rows[2]["recall"] is None and rows[2]["images"] == 0
    assert save_confusion(counts, ["a", "b", "c"], tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def several(count=300, classes=5):
    """Scores with ties, and a class that no image has."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(count, classes, generator=generator) < torch.tensor([0.5, 0.1, 0.3, 0.02, 0.0])
    logits = (torch.randn(count, classes, generator=generator) + 1.5 * labels - 0.7).mul(4).round() / 4
    counts = ManyCounts(classes)
    for part in range(0, count, 64):
        counts.add(logits[part : part + 64], labels[part : part + 64].to(torch.int8))
    assert counts.reduce() == count
    return logits, labels, counts


def test_average_precision_is_scikit_learns():
    logits, labels, counts = several()
    expected = [metrics.average_precision_score(labels[:, k], logits[:, k]) for k in range(4)]
    np.testing.assert_allclose(average_precision(logits, labels)[:4], expected, rtol=1e-12)
    scores, rows = counts.scores(), counts.table("abcde")
    assert scores["val_map"] == pytest.approx(np.mean(expected))
    assert [row["ap"] for row in rows] == [*map(pytest.approx, expected), None]
    assert rows[4]["best_threshold"] is None and rows[4]["recall"] is None
    p = logits.double().sigmoid().numpy()
    loss = np.mean([metrics.log_loss(labels[:, k], p[:, k], labels=[False, True]) for k in range(5)])
    assert scores["val_loss"] == pytest.approx(loss)
    assert scores["val_f1"] == pytest.approx(metrics.f1_score(labels, p > 0.5, average="micro"))


def test_the_table_of_thresholds_is_scikit_learns():
    logits, labels, counts = several()
    p, how = logits.sigmoid().numpy(), dict(zero_division=0)
    for row in counts.thresholds():
        said = p > row["threshold"]
        micro = metrics.precision_recall_fscore_support(labels, said, average="micro", **how)[:3]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(micro)
        assert row["mean_f1"] == pytest.approx(metrics.f1_score(labels, said, average="macro", **how))
    by_threshold = [metrics.f1_score(labels, p > t, average=None, **how) for t in THRESHOLDS]
    rows = counts.table("abcde")
    assert [row["best_threshold"] for row in rows[:4]] == [THRESHOLDS[i] for i in np.argmax(by_threshold, 0)[:4]]
    half = metrics.precision_recall_fscore_support(labels, p > 0.5, average=None, **how)
    np.testing.assert_allclose([row["precision"] for row in rows], half[0])
    np.testing.assert_allclose([row["f1"] for row in rows], half[2])
