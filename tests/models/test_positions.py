"""Fixed positions and first weights of a ViT, against the published codes' tensors and their formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.models import create_encoder
from fastmim.models.positions import sincos_positions

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = dict(name="vit", img_size=(16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=3, key_bias=True)


@pytest.mark.parametrize(("kind", "theirs"), [("sincos", "mae"), ("sincos_moco", "moco")])
def test_positions_of_a_square_are_those_of_the_published_codes(kind, theirs):
    wanted = load_file(GOLDEN / "downstream.safetensors")[f"sincos.{theirs}.4x4_16"]
    torch.testing.assert_close(sincos_positions((4, 4), 16, kind)[0], wanted, atol=2e-7, rtol=0)


@pytest.mark.parametrize("kind", ["sincos", "sincos_moco"])
def test_positions_of_a_rectangle_follow_its_rows_and_columns(kind):
    """2 rows of 3: each half of the channels tells one axis, whichever patch of the other axis is looked at."""
    positions = sincos_positions((2, 3), 8, kind)[0]
    assert positions.shape == (7, 8)
    assert not positions[0].any()
    patches = positions[1:].view(2, 3, 2, 4)
    x, y = (patches[:, :, half] for half in ((0, 1) if kind == "sincos" else (1, 0)))
    torch.testing.assert_close(x[0], x[1])
    torch.testing.assert_close(y[:, 0], y[:, 2])
    for axis, length in ((x[0], 3), (y[:, 0], 2)):
        t = torch.arange(length).double()
        wanted = torch.stack([t.sin(), (t / 100).sin(), t.cos(), (t / 100).cos()], 1)
        torch.testing.assert_close(axis.double(), wanted, atol=1e-7, rtol=0)


def test_fixed_positions_are_part_of_the_weights_and_are_not_trained():
    vit = create_encoder(VIT | dict(abs_pos_embed="sincos", init="mae"))
    torch.testing.assert_close(vit.state_dict()["pos_embed"], sincos_positions((2, 3), 24))
    assert not vit.pos_embed.requires_grad
    cls, patches = vit.forward_tokens(torch.randn(2, 3, 16, 24))
    assert cls.shape == (2, 24)
    assert patches.shape == (2, 2, 3, 24)
    (cls.sum() + patches.square().sum()).backward()
    assert vit.pos_embed.grad is None


@pytest.mark.parametrize("init", ["mae", "moco"])
def test_first_weights_have_the_published_bounds(init):
    torch.manual_seed(0)
    d, fan = 128, 3 * 8 * 8
    size = dict(VIT, embed_dim=d, num_heads=4, abs_pos_embed="sincos", init=init)
    vit = create_encoder(size)
    block = vit.blocks[0]
    wanted = {
        "proj": (vit.patch_embed.proj.weight, math.sqrt(6 / (fan + d))),
        "fc1": (block.mlp.fc1.weight, math.sqrt(6 / (d + 4 * d))),
        "fc2": (block.mlp.fc2.weight, math.sqrt(6 / (d + 4 * d))),
        "out": (block.attn.proj.weight, math.sqrt(6 / (d + d))),
        "qkv": (block.attn.qkv.weight, math.sqrt(6 / (d + (d if init == "moco" else 3 * d)))),
    }
    for name, (weight, bound) in wanted.items():
        assert 0.98 * bound < weight.abs().max() <= bound, name
        assert abs(weight.std() * math.sqrt(3) / bound - 1) < 0.03, name  # of a uniform distribution
    std = 0.02 if init == "mae" else 1e-6
    assert abs(vit.cls_token.std() / std - 1) < 0.2
    for bias in (block.attn.qkv.bias, block.attn.proj.bias, block.mlp.fc1.bias, block.mlp.fc2.bias):
        assert not bias.any()
    assert bool(vit.patch_embed.proj.bias.any()) == (init == "mae")  # which keeps torch's, as the reference does


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(abs_pos_embed="learned"), "abs_pos_embed='learned': must be false, true (learned), 'sincos' or"),
        (dict(abs_pos_embed="sincos", embed_dim=30), "embed_dim=30: not a multiple of 4, as sin-cos positions need"),
        (dict(init="xavier"), "init='xavier': must be one of simmim, timm, mae, moco"),
    ],
)
def test_mistakes_are_named(change, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        create_encoder(VIT | change)
