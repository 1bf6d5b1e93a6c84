"""Encoders against timm's, which shares their parameter names, and against the published sizes."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrStage

from fastmim.interop import load_timm
from fastmim.models import SIZES, create_encoder
from fastmim.models.attend import attend
from fastmim.objectives import create_objective

# Backbone parameters in millions without mask token: recipes of the papers; ViT without its 1k head, and
# DeiT's Ti and S (5.52 and 21.67 M then) without their learned positions of 197 tokens.
PUBLISHED = {
    "swin_tiny": 27.5,
    "swin_small": 48.8,
    "swin_base": 86.7,
    "swin_large": 195.0,
    "swinv2_small": 49.0,
    "swinv2_base": 86.89,
    "swinv2_large": 195.2,
    "swinv2_huge": 655.2,
    "swinv2_g": 1061.0,
    "swinv2_giant": 2998.0,
    "vit_tiny": 5.52 - 197 * 192e-6,
    "vit_small": 21.67 - 197 * 384e-6,
    "vit_base": 85.8,
    "vit_large": 303.3,
    "vit_huge": 630.8,
}


def build_timm(name, **kwargs):
    common = {"num_classes": 0, "global_pool": ""}
    cls = {"swin": SwinTransformer, "swinv2": SwinTransformerV2, "vit": Beit}[name]
    if name == "vit":
        renamed = {
            "rel_pos_bias": "use_rel_pos_bias",
            "shared_rel_pos_bias": "use_shared_rel_pos_bias",
            "abs_pos_embed": "use_abs_pos_emb",
        }
        flags = {new: kwargs.pop(old, False) for old, new in renamed.items()}
        return cls(**common, **flags, **kwargs)
    if "pretrained_window_size" in kwargs:
        kwargs["pretrained_window_sizes"] = (kwargs.pop("pretrained_window_size"),) * len(kwargs["depths"])
    return cls(**common, **kwargs)


def randomise(module):
    """Weights large enough that every term (biases, zero-initialised norms) shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


SWIN = dict(embed_dim=16, depths=(2, 2), num_heads=(2, 4))
CASES = {
    "swin one window size everywhere": dict(SWIN, name="swin", img_size=64, window_size=4),
    "swin window shrinks to the map": dict(SWIN, name="swin", img_size=32, window_size=7),
    "swin rectangle, padded windows": dict(SWIN, name="swin", img_size=(72, 40), window_size=4),
    "swin odd map at merging": dict(SWIN, name="swin", img_size=(60, 52), window_size=5),
    "swin patch 2, three channels of stages": dict(
        name="swin",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
    ),
    "swin one channel, no qkv bias": dict(SWIN, name="swin", img_size=48, window_size=6, in_chans=1, qkv_bias=False),
    "swinv2 shifted": dict(SWIN, name="swinv2", img_size=64, window_size=4),
    "swinv2 rectangle, padded windows": dict(SWIN, name="swinv2", img_size=(40, 72), window_size=4),
    "swinv2 rectangular window": dict(SWIN, name="swinv2", img_size=(64, 32), window_size=(8, 4)),
    "swinv2 pretrained window": dict(SWIN, name="swinv2", img_size=64, window_size=8, pretrained_window_size=4),
    "swinv2 five channels": dict(SWIN, name="swinv2", img_size=48, window_size=6, in_chans=5),
    "vit shared bias": dict(
        name="vit",
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=3,
        shared_rel_pos_bias=True,
        init_values=0.1,
        qkv_bias=True,
    ),
    "vit bias per block, rectangle": dict(
        name="vit",
        img_size=(32, 48),
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        rel_pos_bias=True,
        qkv_bias=True,
    ),
    "vit both biases and positions": dict(
        name="vit",
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=3,
        qkv_bias=True,
        rel_pos_bias=True,
        shared_rel_pos_bias=True,
        abs_pos_embed=True,
    ),
}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES.keys())
def test_equals_timm(kwargs, impl):
    policy = {} if kwargs["name"] == "vit" else {"policy": "parity"}
    unit = 16 if kwargs["name"] == "vit" else 8
    objective = create_objective("simmim", encoder=kwargs | policy, unit=unit, mask_ratio=0.5, impl=impl)
    theirs = build_timm(**kwargs).eval()  # timm drops paths by default
    randomise(theirs)
    report = load_timm(objective, theirs.state_dict())
    assert set(report.initialised) == {"encoder.mask_token", "head.weight", "head.bias"}
    images = torch.randn(2, kwargs.get("in_chans", 3), *objective.img_size)
    ours = objective.encoder(images)
    expected = theirs.forward_features(images)
    if kwargs["name"] == "vit":
        expected = expected[:, 1:].unflatten(1, objective.encoder.grid)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)
    assert ours.shape[-1] == objective.encoder.num_features


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        encoder = create_encoder({"name": name})
    count = sum(p.numel() for n, p in encoder.named_parameters() if n != "mask_token")
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=3e-3)


def test_every_size_is_counted():
    assert set(SIZES) - set(PUBLISHED) == {"swinv2_tiny"}  # no recipe publishes a count for its backbone


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("swin_base", "swin_base_patch4_window7_224"),
        ("swinv2_base", "swinv2_base_window12_192"),
        ("swinv2_large", "swinv2_large_window12_192"),
        ("swinv2_tiny", "swinv2_tiny_window8_256"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
    ],
)
def test_names_and_shapes_are_timms(ours, theirs):
    overrides = {
        "swin_base": {"window_size": 7, "img_size": 224},
        "swinv2_tiny": {"window_size": 8, "img_size": 256},
        "swin_tiny": {"window_size": 7, "img_size": 224},
    }
    with torch.device("meta"):
        encoder = create_encoder({"name": ours, **overrides.get(ours, {})})
        model = timm.create_model(theirs, num_classes=0)
    shapes = {n: tuple(p.shape) for n, p in encoder.state_dict().items() if n != "mask_token"}
    assert shapes == {n: tuple(p.shape) for n, p in model.state_dict().items()}


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small"])
def test_small_vits_have_the_blocks_of_timms(name):
    """All parameters are timm's but positions, the bias of keys, LayerScale and its class token."""
    with torch.device("meta"):
        encoder = create_encoder({"name": name})
        model = timm.create_model(f"{name}_patch16_224", num_classes=0)

    def shapes(module, left_out=("bias", "pos", "token", "gamma")):
        return {n: tuple(p.shape) for n, p in module.named_parameters() if not any(word in n for word in left_out)}

    assert shapes(encoder) == shapes(model)
    assert encoder.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


def test_extra_norms_of_huge_and_giant():
    """Every sixth block of a stage, as timm's SwinTransformerV2Cr places them: 3 in H, 7 in G, all in stage 3."""

    def norms(name, **kwargs):
        with torch.device("meta"):
            encoder = create_encoder({"name": name, **kwargs})
        return [
            (s, b)
            for s, stage in enumerate(encoder.layers)
            for b, block in enumerate(stage.blocks)
            if block.norm3 is not None
        ]

    with torch.device("meta"):
        cr = SwinTransformerV2CrStage(
            embed_dim=64,
            depth=18,
            downscale=False,
            num_heads=2,
            feat_size=(12, 12),
            window_size=(12, 12),
            extra_norm_period=6,
        )
    theirs = [b for b, block in enumerate(cr.blocks) if not isinstance(block.norm3, torch.nn.Identity)]
    assert norms("swinv2_huge") == [(2, b) for b in theirs]
    assert norms("swinv2_giant") == [(2, b) for b in (5, 11, 17, 23, 29, 35, 41)]
    assert norms("swinv2_huge", extra_norm_scope="global") == [(2, 1), (2, 7), (2, 13), (3, 1)]


def test_initialisation_of_each_family():
    torch.manual_seed(0)
    v2 = create_encoder(dict(SWIN, name="swinv2", img_size=64, window_size=4))
    for block in (b for stage in v2.layers for b in stage.blocks):
        assert not block.norm1.weight.any() and not block.norm2.weight.any() and not block.attn.q_bias.any()
        assert torch.allclose(block.attn.logit_scale.exp(), torch.tensor(10.0))
    swin = create_encoder(dict(SWIN, name="swin", img_size=64, window_size=4, embed_dim=64))
    qkv = swin.layers[0].blocks[0].attn.qkv
    assert qkv.weight.std().item() == pytest.approx(0.02, rel=0.05) and not qkv.bias.any()
    vit = create_encoder(dict(name="vit", img_size=64, embed_dim=96, depth=3, num_heads=3, init_values=0.1))
    # A normal of std s truncated at ±s has standard deviation 0.5396·s.
    for i, block in enumerate(vit.blocks, start=1):
        expected = 0.02 * 0.5396 / (2 * i) ** 0.5
        assert block.attn.proj.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.mlp.fc1.weight.abs().max() <= 0.02 and torch.equal(block.gamma_1, torch.full((96,), 0.1))


def test_drop_path_keeps_the_expectation_and_is_off_in_eval():
    encoder = create_encoder(dict(SWIN, name="swin", img_size=32, window_size=4, drop_path_rate=0.5))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder.eval()(images), encoder(images))
    drop = encoder.train().shared.drop_paths
    torch.manual_seed(0)
    factors = drop(20000)
    assert drop.rates[0] == 0 and drop.rates[-1] == 0.5 and factors[0] == (None, None)
    assert set(factors[-1][0].unique().tolist()) == {0.0, 2.0}
    drawn = torch.stack([branch for pair in factors[1:] for branch in pair])
    # Mean 1, and no two branches share their draws.
    assert torch.allclose(drawn.mean(1), torch.ones(6), atol=4 * (1 / 20000) ** 0.5)
    assert torch.corrcoef(drawn).sub(torch.eye(6)).abs().max() < 5 * (1 / 20000) ** 0.5


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(name="swinv3_base"), "did you mean 'swinv2_base'"),
        (dict(name="swinv2_base", img_size=190), "img_size=190: not divisible by patch_size 4; use 188 or 192"),
        (dict(name="swinv2_base", num_head=3), "no such argument"),
        (
            dict(SWIN, name="swin", img_size=32, num_heads=(3, 4)),
            r"num_heads=\[3, 4\]: 3 does not divide the 16 channels of stage 0; use 2",
        ),
        (dict(SWIN, name="swin", img_size=32, drop_path_rate=1.5), "drop_path_rate=1.5"),
        (dict(SWIN, name="swin", img_size=32, num_heads=(3,)), "must list one number per stage"),
        (dict(name="vit", embed_dim=30, num_heads=4), "num_heads=4"),
        (dict(SWIN, name="swinv2", img_size=32, extra_norm_scope="all"), "extra_norm_scope='all'"),
        (dict(SWIN, name="swin", img_size=32, policy="timm"), "policy='timm'"),
    ],
)
def test_errors_name_the_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_encoder(kwargs)


def test_attention_in_bf16_is_as_exact_as_torchs_own():
    """37 tokens, the local crops of a ViT/16; errors of the result and of every gradient against float64."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 37, 16, dtype=torch.float64).bfloat16() for _ in range(3)]

    def result(run, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in given]
        out = run(*inputs)
        return [t.double() for t in (out, *torch.autograd.grad(out.sin().sum(), inputs))]

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    exact, fused = result(plain, torch.float64), result(plain, torch.bfloat16)
    own = result(lambda q, k, v: attend(q, k, v, None), torch.bfloat16)
    for value, other, truth in zip(own, fused, exact, strict=True):
        assert (value - truth).norm() <= 2 * (other - truth).norm()
