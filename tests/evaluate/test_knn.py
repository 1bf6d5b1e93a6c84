"""k-NN votes and RankMe against their definitions written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastmim.evaluate import knn
from fastmim.evaluate.knn import knn_accuracy, knn_votes
from fastmim.evaluate.rank import rankme


def cloud(count, seed, classes=3, width=7):
    """Classes around centres of their own, of very different lengths, which the cosine does not see."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    points = centres[labels] + 0.8 * torch.randn(count, width, generator=generator)
    return points * torch.rand(count, 1, generator=generator) * 100, labels


def votes_by_hand(train, labels, x, k, classes):
    similar = sorted(
        ((float(torch.cosine_similarity(x.double(), t.double(), dim=0)), int(y)) for t, y in zip(train, labels)),
        reverse=True,
    )
    return [sum(math.exp(s / 0.07) for s, y in similar[:k] if y == c) for c in range(classes)]


def test_votes_are_those_of_the_definition_whatever_the_chunks(monkeypatch):
    (train, labels), (test, truth) = cloud(40, 0), cloud(23, 1)
    monkeypatch.setattr(knn, "_CHUNK", 40 * 5)  # five test images at once, the last three
    found = list(knn_votes(train, labels, test, classes=3, neighbours=[1, 4, 40]))
    assert [chunk.stop - chunk.start for chunk, _ in found] == [5, 5, 5, 5, 3]
    hits = 0
    for k in (1, 4, 40):
        table = torch.cat([votes[k] for _, votes in found])
        wanted = torch.tensor([votes_by_hand(train, labels, x, k, 3) for x in test])
        torch.testing.assert_close(table, wanted, rtol=2e-5, atol=0)
        hits = int((wanted.argmax(1) == truth).sum())
        accuracy = knn_accuracy(train, labels, test, truth, classes=3, neighbours=[k])
        assert accuracy == {k: (pytest.approx(100 * hits / 23), 100.0)}
    assert 0 < hits < 23


def test_more_neighbours_than_images_are_all_of_them_with_a_word(caplog):
    """The reference crashes below 100 test images; here neither side has so many."""
    (train, labels), (test, truth) = cloud(12, 0), cloud(1, 1)
    found = knn_accuracy(train, labels, test, truth, classes=3)
    assert list(found) == [10, 12]
    assert "only 12 training images" in caplog.text


@pytest.mark.parametrize(("rows", "columns"), [(50, 8), (5, 8), (1, 3)])
def test_rankme_is_its_definition(rows, columns):
    z = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    sigma = torch.linalg.svdvals(z).tolist()
    p = [s / sum(sigma) + 1e-7 for s in sigma]
    assert rankme(z) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-9)


def test_rankme_of_a_collapse_and_of_equal_directions():
    assert rankme(torch.ones(30, 6) * torch.arange(1, 31)[:, None]) == pytest.approx(1, abs=1e-4)
    assert rankme(5 * torch.eye(6)) == pytest.approx(6, abs=1e-4)
    assert rankme(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-4)
