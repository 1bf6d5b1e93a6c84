"""Who casts, who adds a bias and who adds gradients changes no result: each plan on a CPU, by torch's ops."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastmim_kernels
from fastmim.objectives import create_objective

SMALL = dict(img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4)
ENCODERS = {
    "swin": dict(SMALL, name="swin"),
    "swin, norms on the stream": dict(SMALL, name="swin", extra_norm_period=2),
    "swinv2": dict(SMALL, name="swinv2"),
    "swinv2, map that the window pads": dict(SMALL, name="swinv2", img_size=(40, 72)),
    "swinv2, norms on the stream": dict(SMALL, name="swinv2", extra_norm_period=2),
}


def plan(monkeypatch, **facts):
    monkeypatch.setattr(fastmim_kernels, "fusion", lambda *args: fastmim_kernels.Fusion(**facts))


def build(name):
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder=ENCODERS[name] | {"drop_path_rate": 0.3}, unit=16, impl="torch")
    with torch.no_grad():
        for parameter in objective.parameters():  # norms and biases that start at zero would hide what is behind them
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return objective.double().train()


def run(objective, mask):
    torch.manual_seed(2)  # stochastic depth
    objective.zero_grad()
    images = torch.randn(3, 3, *objective.img_size, generator=torch.Generator().manual_seed(1)).double()
    loss = objective(images, mask)["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in objective.parameters())]


@pytest.mark.parametrize("loss_on", ["masked", "all"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_plan_gives_the_same_loss_and_gradients(name, loss_on, monkeypatch):
    objective = build(name)
    objective.loss_on = loss_on  # "masked": the last block computes some rows only
    mask = objective.random_mask(torch.arange(3))
    plan(monkeypatch)
    expected = run(objective, mask)
    plans = itertools.product((False, True), repeat=2)
    for norm_adds, product_adds, one_node in [*((*facts, False) for facts in plans), (False, False, True), (True,) * 3]:
        plan(monkeypatch, norm_adds_bias=norm_adds, product_adds_gradients=product_adds, one_node=one_node)
        for ours, theirs in zip(run(objective, mask), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_a_stream_handed_on_keeps_its_dtype(monkeypatch):
    """The second reader must not get the copy that the product reads, where the stream is wider."""
    plan(monkeypatch, norm_adds_bias=True, product_adds_gradients=True)
    torch.manual_seed(0)
    encoder = dict(ENCODERS["swinv2"], residual_dtype="fp32")
    objective = create_objective("simmim", encoder=encoder, unit=16, impl="torch")
    seen = []
    for block in objective.encoder.all_blocks():
        block.register_forward_hook(lambda module, args, outputs: seen.append([x.dtype for x in outputs]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        objective(torch.randn(1, 3, 64, 64), torch.ones(1, 16, 16, dtype=torch.bool))
    gathered = [torch.bfloat16] * 2  # read by the product of the next stage's merging alone
    assert seen == [[torch.float32, torch.bfloat16], gathered, *[[torch.float32, torch.bfloat16]] * 2]


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_branch_that_a_hook_watches_is_called_as_a_module(name, monkeypatch):
    plan(monkeypatch, norm_adds_bias=True, product_adds_gradients=True, one_node=True)
    objective = build(name)
    mask = objective.random_mask(torch.arange(3))
    expected = run(objective, mask)
    seen = []
    block = objective.encoder.layers[0].blocks[1]
    parts = {"attn": block.attn, "mlp": block.mlp}
    for part, module in parts.items():
        module.register_forward_hook(lambda module, args, outputs, part=part: seen.append(part))
    for ours, theirs in zip(run(objective, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert seen == ["attn", "mlp"]
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, outputs: seen.append(type(module))):
        run(objective, mask)
    assert {type(part) for part in parts.values()} <= set(seen)
