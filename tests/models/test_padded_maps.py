"""Encoders on maps that the window does not divide: timm's model, attending by the definition, is the truth."""

from __future__ import annotations

import pytest
import torch

from fastmim.interop import load_timm
from fastmim.models import create_encoder
from fastmim.models.rules import policy_matters
from fastmim.objectives import create_objective
from tests.kernels.window_definition import as_defined, reach
from tests.models.test_encoders import build_timm, randomise

SMALL = dict(embed_dim=8, depths=(2, 2), num_heads=(2, 2))
# Maps of one stage and the next in tokens, window. Odd edges and one row; half windows; one edge within the window.
CASES = {
    "11x14 and 6x7, windows of 4": ((11, 14), 4),
    "9x13 and 5x7, windows of 7": ((9, 13), 7),
    "12x17 and 6x9, windows of 8": ((12, 17), 8),
    "6x19 and 3x10, windows of 4x7": ((6, 19), (4, 7)),
    "16x8 and 8x4, windows of 4": ((16, 8), 4),
}


def pair(name, grid, window):
    """An objective's encoder, and timm's model with the same weights."""
    encoder = dict(SMALL, name=name, img_size=(2 * grid[0], 2 * grid[1]), patch_size=2, window_size=window)
    objective = create_objective("simmim", encoder=encoder, unit=2, impl="torch")
    theirs = build_timm(**encoder).eval()
    randomise(theirs)
    load_timm(objective, theirs.state_dict())
    return objective.encoder.double(), theirs.double()


def run(model, forward, images):
    images = images.clone().requires_grad_()
    out = forward(images)
    out.backward(torch.cos(torch.arange(out.numel()).view_as(out)))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": images.grad, **gradients}


@pytest.mark.parametrize("grid, window", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_outputs_and_gradients_are_those_of_the_definition(name, grid, window):
    ours, theirs = pair(name, grid, window)
    torch.manual_seed(1)
    images, truth = torch.randn(2, 3, *ours.img_size).double(), as_defined(theirs)
    found, expected = run(ours, ours, images), run(truth, truth.forward_features, images)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-9 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_policy_matters_where_the_outputs_say_so(name):
    """Of one axis, every length of two windows and lengths within one; the other fits."""
    for window in (3, 4, 6):
        for edge in (2, *range(window, 2 * window + 1)):
            size = (4 * window, 2 * edge)
            settings = dict(name=name, img_size=size, patch_size=2, window_size=window, embed_dim=8)
            settings |= {"depths": (2,), "num_heads": (2,)}
            default, parity = (create_encoder(settings | {"policy": policy}) for policy in ("default", "parity"))
            randomise(default)
            parity.load_state_dict(default.state_dict())
            images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
            differ = not torch.allclose(default(images), parity(images), atol=1e-5)
            assert differ == policy_matters(default.settings), (window, edge)


@pytest.mark.parametrize("size, window", [((11, 13), 4), ((9, 5), 7), ((10, 15), 8), ((8, 12), 4)])
@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_token_reaches_its_windows_only(name, size, window):
    """Each token of the map in turn is changed. A sharp softmax may hide a few of those that it reaches."""
    torch.manual_seed(1)
    count, shift = size[0] * size[1], tuple(0 if edge <= window else window // 2 for edge in size)
    encoder = dict(name=name, img_size=size, patch_size=1, embed_dim=8, depths=(2,), num_heads=(2,), window_size=window)
    model = create_encoder(encoder).double()
    randomise(model)
    images = torch.randn(1, 3, *size).double()
    others = images + torch.eye(count).double().view(count, 1, *size) * torch.randn(3, 1, 1).double()
    with torch.no_grad():
        changed = (model(others) - model(images)).abs().amax(-1).view(count, count) > 1e-12
    fitted = tuple(min(window, edge) for edge in size)
    near = reach(size, fitted, shift)
    assert not (changed.T & ~near).any() and (changed.T & near).sum() > 0.9 * near.sum()
