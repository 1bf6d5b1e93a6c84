"""The last block on the tokens that the loss reads: same loss and gradients as on all of them, with fewer rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmim.models import read_rows
from fastmim.objectives import create_objective, simmim

ENCODERS = {
    "swin": dict(name="swin", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4),
    "swin, map that the window pads": dict(
        name="swin", img_size=(48, 80), embed_dim=16, depths=(1, 2), num_heads=(2, 2), window_size=4
    ),
    "swinv2": dict(name="swinv2", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4),
    "swinv2, norm on the stream of the last block": dict(
        name="swinv2", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, extra_norm_period=2
    ),
    "swin, norm on the stream of the last block": dict(
        name="swin", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, extra_norm_period=2
    ),
    "vit": dict(name="vit", img_size=64, embed_dim=32, depth=2, num_heads=2, init_values=0.1, shared_rel_pos_bias=True),
}


def build(name, **kwargs):
    torch.manual_seed(0)
    objective = create_objective(
        "simmim", encoder=ENCODERS[name] | {"drop_path_rate": 0.3}, unit=16, impl="torch", **kwargs
    )
    with torch.no_grad():
        for parameter in objective.parameters():  # norms that start at zero would hide everything behind them
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return objective.double().train()


def inputs(objective):
    """Of three samples one has few masked tokens, one has none."""
    images = torch.randn(3, 3, *objective.img_size, generator=torch.Generator().manual_seed(1)).double()
    mask = objective.random_mask(torch.arange(3))
    mask[1] = False
    mask[1, :2, -3:] = True
    mask[2] = False
    return images, mask


def run(objective, images, mask):
    torch.manual_seed(2)  # stochastic depth
    objective.zero_grad()
    loss = objective(images, mask)["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in objective.parameters())]


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("name", ENCODERS)
def test_loss_and_gradients_are_those_of_all_rows(name, loss, monkeypatch):
    objective = build(name, loss=loss)
    images, mask = inputs(objective)
    found = run(objective, images, mask)
    monkeypatch.setattr(simmim, "masked_tokens", lambda *args: None)
    for ours, whole in zip(found, run(objective, images, mask), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["swinv2", "vit"])
def test_bfloat16(name, monkeypatch):
    """As close as roundings allow: products over other numbers of rows may add in another order."""
    objective = build(name).float()
    images, mask = inputs(objective)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(objective, images.float(), mask)
        monkeypatch.setattr(simmim, "masked_tokens", lambda *args: None)
        expected = run(objective, images.float(), mask)
    for ours, whole in zip(found, expected, strict=True):
        assert (ours - whole).norm() <= 2e-2 * whole.norm() + 1e-6


def last_mlp_rows(objective, images, mask):
    blocks = [m for m in objective.encoder.modules() if type(m).__name__ in ("SwinBlock", "SwinV2Block", "VitBlock")]
    seen = []
    handle = blocks[-1].mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    objective(images, mask)
    handle.remove()
    return seen[0] // blocks[-1].norm2.weight.numel()


@pytest.mark.parametrize("name", ENCODERS)
def test_only_read_rows_are_computed(name):
    objective = build(name)
    images, mask = inputs(objective)
    stride = objective.stride // objective.patch_size
    grid = objective.token_grid
    read = sum(
        bool(mask[b, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].any())
        for b in range(3) for y in range(grid[0]) for x in range(grid[1])
    )  # fmt: skip
    assert last_mlp_rows(objective, images, mask) == read < 3 * grid[0] * grid[1]
    extra = 3 if name == "vit" else 0  # class tokens
    for everything in (torch.ones_like(mask), torch.zeros_like(mask)):
        assert last_mlp_rows(objective, images, everything) == 3 * grid[0] * grid[1] + extra
    assert last_mlp_rows(build(name, loss_on="all"), images, mask) == 3 * grid[0] * grid[1] + extra


def test_nothing_depends_on_data_under_a_compiler_or_on_fake_tensors():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 0] = False
    size = (16, 16), (4, 4), 4
    assert read_rows.masked_tokens(mask, *size).tolist() == list(range(4, 16))
    with FlopCounterMode(display=False):
        assert read_rows.masked_tokens(mask, *size) is None
    with torch._subclasses.FakeTensorMode() as mode:
        assert read_rows.masked_tokens(mode.from_tensor(mask), *size) is None
    assert torch.compile(lambda m: torch.tensor(read_rows.masked_tokens(m, *size) is None), backend="eager")(mask)
