"""Linear probes: gradients and optimisers against torch's, many classifiers at once against each alone, the optimum
against scikit-learn's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from fastmim.evaluate.directions import DIRECTIONS
from fastmim.evaluate.linear import Probe, Way, _factor, linear_probe
from fastmim.evaluate.protocols import PROTOCOLS, Protocol
from fastmim.models import create_encoder

CLASSES = 3


def points(count, seed, width=5):
    """Overlapping classes: the best classifier is finite."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(4))
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_those_of_autograd(batch_norm):
    x, y = points(12, 0)
    inputs = torch.stack([x, F.pad(x[:, :3], (0, 2))])
    probe = Probe([5, 3], 2, CLASSES, batch_norm=batch_norm, generator=torch.Generator().manual_seed(0))
    assert not probe.weight[1, 3:].any() and probe.weight[1, :3].std() == pytest.approx(0.01, rel=0.5)
    probe.weight[:, :, 1] *= 50  # the classifiers of a set differ
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    seen = probe.inputs(inputs)
    if batch_norm:
        torch.testing.assert_close(seen[0], F.batch_norm(x, None, None, training=True, eps=1e-6))
    loss = 0
    for s in range(2):
        for r in range(2):
            loss = loss + F.cross_entropy(seen[s] @ weight[s, :, r] + bias[s, 0, r], y)
    loss.backward()
    for found, wanted in zip(probe.gradients(seen, y), (weight.grad, bias.grad), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("name", "theirs"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_directions_are_torchs_steps_at_each_rate(name, theirs):
    """(LARS: the golden file.) Two classifiers at two rates, each against an optimiser of its own."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1, 4, 2, 3, generator=generator, dtype=torch.float64)
    rates, grads = [0.3, 0.01], torch.randn(5, 1, 4, 2, 3, generator=generator, dtype=torch.float64)
    how = {"momentum": 0.9} if name == "sgd" else {}
    alone = [torch.nn.Parameter(weight[0, :, r].clone()) for r in range(2)]
    optimisers = [theirs([p], lr=lr, weight_decay=0.1, **how) for p, lr in zip(alone, rates, strict=True)]
    direction = DIRECTIONS[name]([weight], 0.1)
    for grad in grads:
        (step,) = direction([weight], [grad])
        weight = weight - torch.tensor(rates, dtype=torch.float64).view(1, 1, 2, 1) * step
        for r in range(2):
            alone[r].grad = grad[0, :, r].clone()
            optimisers[r].step()
    for r in range(2):
        torch.testing.assert_close(weight[0, :, r], alone[r].data)


def test_all_at_once_are_each_alone():
    """Rates and sets, one of them narrower, do not touch each other."""
    (x, y), (test, truth) = points(60, 0), points(300, 1)
    plan = Protocol("each", "adamw", (0.003, 1.0), batch=20, epochs=4, batch_norm=True)
    sets, tried = [x, x[:, :3]], [test, test[:, :3]]
    together = linear_probe(plan, [Way(sets, y)], tried, truth, classes=CLASSES, seed=3)
    assert [(one.features, one.rate) for one in together] == [(0, 0.003), (0, 1.0), (1, 0.003), (1, 1.0)]
    assert len({one.top1 for one in together}) > 2 and all(one.top5 == 100 for one in together)
    for one in together:
        if one.features == 0:  # of a narrower set alone, other first weights are drawn
            single = replace(plan, rates=(one.rate,))
            assert linear_probe(single, [Way([x], y)], [test], truth, classes=CLASSES, seed=3)[0].top1 == one.top1


def test_long_training_reaches_the_optimum_of_scikit_learn():
    (x, y), (test, truth) = points(90, 0), points(3000, 1)
    wanted = 100 * LogisticRegression(C=float("inf"), tol=1e-8, max_iter=5000).fit(x, y).score(test, truth)
    plan = Protocol("last", rates=(0.5 * 256 / 90,), batch=90, epochs=600)
    (found,) = linear_probe(plan, [Way([x], y)], [test], truth, classes=CLASSES)
    assert 40 < wanted < 90 and found.top1 == pytest.approx(wanted, abs=0.15)


def test_ways_to_cut_the_images_are_read_in_turn():
    """With one class a way, the classifier says what it has read last."""
    x, (test, truth) = torch.ones(10, 2), (torch.ones(4, 2), torch.tensor([1, 1, 1, 1]))
    ways = [Way([x], torch.zeros(10, dtype=torch.int64)), Way([x], torch.ones(10, dtype=torch.int64))]
    plan = Protocol("last", rates=(25.6,), batch=10, by_epoch=False, epochs=2)
    assert linear_probe(plan, ways[:1], [test], truth, classes=2)[0].top1 == 0
    assert linear_probe(plan, ways[1:], [test], truth, classes=2)[0].top1 == 100


def test_schedules():
    cosine, mae = PROTOCOLS["dino"], PROTOCOLS["mae"]
    assert [_factor(cosine, e, 100) for e in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert [_factor(mae, e, 90) for e in (0, 0.5, 10, 50)] == pytest.approx([0, 0.05, 1, 0.5])
    assert len(PROTOCOLS["ibot"].rates) == 45 and max(PROTOCOLS["ibot"].rates) == 9


@pytest.mark.parametrize(
    ("name", "sizes", "widths"),
    [
        ("dino", {"embed_dim": 12, "depth": 5}, [48]),
        ("ibot", {"embed_dim": 12, "depth": 2}, [24]),
        ("ibot", {"embed_dim": 768, "depth": 2}, [2 * 768]),
        ("mae", {"embed_dim": 12, "depth": 3}, [12]),
        ("beit", {"embed_dim": 12, "depth": 3}, [24, 24, 24]),
    ],
)
def test_what_protocols_read_of_a_vit(name, sizes, widths):
    plan = PROTOCOLS[name]
    encoder = create_encoder({"name": "vit", "img_size": 16, "patch_size": 8, "num_heads": 2, "key_bias": True, **sizes})
    found = encoder.features(torch.randn(2, 3, 16, 16), *plan.blocks(encoder))
    sets = plan.features(encoder, found, "cls")
    assert [one.shape[1] for one in sets] == widths
    assert torch.equal(sets[-1][:, -sizes["embed_dim"] :], found[-1].mean if widths[0] in (24, 1536) and name != "ibot"
                       or widths[0] == 1536 else found[-1].cls)  # fmt: skip
