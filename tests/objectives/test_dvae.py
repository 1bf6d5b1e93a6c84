"""The discrete autoencoder's noise, loss and counts of codes."""

from __future__ import annotations

import math

import pytest
import torch

from fastmim.objectives import create_objective
from fastmim.objectives.dvae import WINDOW
from fastmim.objectives.keys import GUMBEL, crop_keys
from fastmim.objectives.noise import gumbel

TINY = dict(name="dvae", img_size=16, patch_size=4, embed_dim=8, depth=1, codes=12, code_dim=6)


def build(**own):
    torch.manual_seed(0)
    return create_objective("dvae", encoder=own.pop("encoder", TINY), **own)


def keys(count):
    return crop_keys(torch.arange(count), 1, seed=3, epoch=1, crop=0, purpose=GUMBEL)[:, 0]


def test_the_noise_is_gumbels():
    drawn = gumbel(keys(40), (5000,)).double().flatten()
    n = len(drawn)
    # Mean γ and variance π²/6, within 5 standard errors (fourth central moment 14.6).
    assert abs(drawn.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(drawn.var() - math.pi**2 / 6) < 5 * math.sqrt((14.61 - (math.pi**2 / 6) ** 2) / n)
    sorted_, cdf = drawn.sort().values, torch.arange(1, n + 1) / n
    assert (torch.exp(-torch.exp(-sorted_)) - cdf).abs().max() < math.sqrt(-math.log(1e-6 / 2) / (2 * n))
    # Neighbouring places and neighbouring images are not alike.
    rows = drawn.view(40, 5000)
    for one, other in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1])):
        found = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert abs(found) < 5 / math.sqrt(one.numel())


def test_the_noise_of_a_sample_is_its_own():
    objective = build()
    ids = torch.tensor([7, 3, 9])
    mask = objective.random_mask(ids, seed=1, epoch=2)
    assert torch.equal(objective.random_mask(ids.flip(0), seed=1, epoch=2), mask.flip(0))
    assert torch.equal(gumbel(mask, (2, 3))[1], gumbel(mask[1:2], (2, 3))[0])
    others = [objective.random_mask(ids, seed=seed, epoch=epoch) for seed, epoch in ((1, 3), (2, 2))]
    assert all((other != mask).all() for other in others)


def test_the_loss_is_its_formula():
    objective = build(temperature=0.7, kl_weight=0.1, balance_weight=0.2)
    images = torch.rand(4, 3, 16, 16)
    mask = objective.random_mask(torch.arange(4))
    found = objective((images - objective.mean) / objective.std, mask)
    model = objective.autoencoder
    logits = model.logits(images)
    soft = torch.exp(torch.log_softmax((logits + gumbel(mask, (12, 4, 4))) / 0.7, 1))
    codes = torch.einsum("bkhw,kd->bdhw", soft, model.codebook.weight)
    mse = ((model.decoder(codes) + 1) / 2 - images).square().mean()
    q = logits.softmax(1)
    place = (q * (q * 12).log()).sum(1).mean()
    mean = q.mean((0, 2, 3))
    expected = mse + 0.1 * place + 0.2 * (mean * (mean * 12).log()).sum()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["mse"], mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["mean_colour"], images.flatten(2).var(2, correction=0).mean())
    objective.eval()
    hard = (
        (model.pixels(model(images)) - images).square().mean(),
        objective(images_of(objective, images), mask)["mse"],
    )
    assert hard[0] <= hard[1] + 1e-6  # clamped pixels are no further away


def images_of(objective, images):
    return (images - objective.mean) / objective.std


def test_uint8_is_the_same_image():
    objective = build().eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mask = objective.random_mask(torch.arange(2))
    found = [objective(one, mask)["loss"] for one in (images, images_of(objective, images / 255))]
    torch.testing.assert_close(*found)


def test_codes_that_were_used_of_late_count():
    objective = build(temperature=1.0, temperature_end=0.25)
    images = torch.rand(4, 3, 16, 16)
    mask = objective.random_mask(torch.arange(4))
    assert objective(images, mask)["codes_used"] == 0
    used = set(objective.autoencoder(images * objective.std + objective.mean).flatten().tolist())
    objective.after_step()
    assert objective(images, mask)["codes_used"] == pytest.approx(len(used) / 12)
    objective.skip_step()
    for _ in range(WINDOW):
        objective.after_step()
    assert objective(images, mask)["codes_used"] == 0
    heats = []
    for step in (0, 50, 100):
        objective.set_step(step, 100, 10)
        heats.append(objective.temperature.item())
    assert heats == pytest.approx([1.0, 0.625, 0.25])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(temperature=0.0), "temperature=0.0: must be > 0"),
        (dict(balance_weight=-1.0), "balance_weight=-1.0: must be at least 0"),
        (dict(encoder=dict(name="vit", img_size=32)), "encoder=vit: DVAE trains dvae, dalle; set model.name"),
    ],
)
def test_arguments_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        build(**given)


def test_other_objectives_refuse_an_autoencoder():
    with pytest.raises(ValueError, match="encoder=dvae: SimMIM trains swin, swinv2, vit"):
        create_objective("simmim", encoder=TINY | dict(img_size=64))


def test_the_forward_pass_is_one_graph():
    objective = build(balance_weight=0.1)
    images, mask = torch.rand(2, 3, 16, 16), objective.random_mask(torch.arange(2))
    compiled = torch.compile(objective, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(images, mask)["loss"], objective(images, mask)["loss"])
