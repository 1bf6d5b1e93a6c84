"""Losses by name: a new one is an entry of the table, and every pixel loss means the same average."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmim.objectives import create_objective, losses

ENCODER = dict(name="swin", img_size=(60, 44), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)


def build(loss):
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder=ENCODER, unit=8, loss=loss)
    return objective, torch.randn(2, 3, 60, 44), objective.random_mask(torch.arange(2))


@pytest.mark.parametrize("name, error", [("l1", F.l1_loss), ("l2", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)])
def test_an_error_per_pixel_averages_as_the_fused_losses_do(name, error, monkeypatch):
    """The size is no multiple of a token's 8 pixels: what lies beyond the image counts nowhere."""
    plain = losses.pixelwise(lambda prediction, target: error(prediction, target, reduction="none"))
    monkeypatch.setitem(losses.PIXEL_LOSSES, "mine", plain)
    found = {}
    for loss in (name, "mine"):
        objective, images, mask = build(loss)
        value = objective(images, mask)["loss"]
        value.backward()
        found[loss] = value, {name: param.grad for name, param in objective.named_parameters()}
    torch.testing.assert_close(found["mine"][0], found[name][0], rtol=1e-5, atol=0)
    for parameter, grad in found[name][1].items():
        torch.testing.assert_close(found["mine"][1][parameter], grad, rtol=1e-3, atol=1e-6, msg=parameter)


def test_an_unknown_loss_names_those_there_are(monkeypatch):
    monkeypatch.setitem(losses.PIXEL_LOSSES, "mine", losses.PIXEL_LOSSES["l1"])
    with pytest.raises(ValueError, match="loss='l3': must be one of l1, l2, smooth_l1, mine"):
        build("l3")
