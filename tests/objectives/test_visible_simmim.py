"""SimMIM on visible tokens: what it reads and predicts, its decoder, its mistakes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastmim.objectives import create_objective
from fastmim.objectives.visible_decoder import VisibleDecoder
from fastmim_kernels import reference

TINY = dict(patch_size=4, in_chans=2, embed_dim=8, depths=(2, 1, 1), num_heads=(1, 2, 4), window_size=3)


def build(family="swin", img_size=(48, 80), unit=16, **options):
    torch.manual_seed(0)
    encoder = dict(TINY, name=family, img_size=img_size)
    how = dict(visible_only=True, decoder_dim=16, decoder_depth=2, decoder_num_heads=2)
    return create_objective("simmim", encoder=encoder, unit=unit, **how | options)


@pytest.mark.parametrize("options", [{}, dict(norm_target=5, loss="smooth_l1"), dict(loss_on="all")])
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_loss_is_the_papers_formula_of_what_it_predicts(family, options):
    objective = build(family, **options)
    images, mask = torch.randn(3, 2, 48, 80), objective.random_mask(torch.arange(3))
    target = reference.local_norm_target(images, 5) if options.get("norm_target") else images
    error = reference.pointwise_loss(objective.reconstruct(images, mask), target, options.get("loss", "l1"))
    counts = torch.ones_like(mask) if options.get("loss_on") == "all" else mask
    pixels = counts.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    expected = (error * pixels).sum() / (pixels.sum() + 1e-5) / 2
    torch.testing.assert_close(objective(images, mask)["loss"], expected)


def test_every_parameter_learns_and_none_is_left_over():
    """DistributedDataParallel and ZeRO ask for a gradient of each."""
    objective = build(loss_on="all")
    images, mask = objective.example(2)
    objective(images, mask)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters() if p.ndim > 1)
    assert "encoder.mask_token" not in dict(objective.named_parameters())


SQUARE = dict(mask="square", mask_ratio=0.27)


@pytest.mark.parametrize("unit, shape, shown, mask", [
    (16, (48, 80), 6, {}), (32, (64, 96), 8, {}), (16, (32, 32), 1, {}), (16, (48, 80), 6, dict(mask="block")),
    (16, (48, 80), 11, SQUARE),
])  # fmt: skip
def test_as_many_tokens_are_seen_in_every_image(unit, shape, shown, mask):
    """Of n units ⌈0.6·n⌉ are hidden, or a square of four; a unit of 32 px has four tokens of 16."""
    objective = build(img_size=shape, unit=unit, **mask)
    mask = objective.random_mask(torch.arange(5), epoch=3)
    seen = []
    objective.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    assert objective.reconstruct(torch.randn(5, 2, *shape), mask).shape == (5, 2, *shape)
    objective(torch.randn(5, 2, *shape), mask)
    assert [one.shape[:2] for one in seen] == [(1, shown)] * 5 + [(5, shown)]
    assert ((~mask).sum((1, 2)) == 16 * shown).all()


def test_hidden_pixels_do_not_reach_the_prediction():
    objective = build("swinv2")
    images, mask = torch.randn(2, 2, 48, 80), objective.random_mask(torch.arange(2))
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    found = objective.reconstruct(images, mask)
    assert torch.equal(objective.reconstruct(images.masked_fill(hidden, 1e4), mask), found)
    assert not torch.equal(objective.reconstruct(images.masked_fill(~hidden, 0), mask), found)


def test_the_decoder_is_a_pre_norm_transformer_over_all_places():
    """Written out with torch's own layers."""
    torch.manual_seed(0)
    decoder = VisibleDecoder(12, (2, 3), dim=8, depth=2, num_heads=2)
    tokens, keep = torch.randn(2, 2, 12), torch.tensor([[4, 1], [0, 5]])
    x = decoder.mask_token.expand(2, 6, 8).clone()
    for image in range(2):
        x[image, keep[image]] = decoder.embed(tokens[image])
    x = x + decoder.positions
    for block in decoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    torch.testing.assert_close(decoder(tokens, keep).flatten(1, 2), decoder.norm(x))


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_traces_as_one_graph_and_runs_on_fake_tensors(family):
    objective = build(family)
    images, mask = objective.example(2)
    expected = objective(images, mask)["loss"]
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, mask)["loss"], expected)
    with FakeTensorMode():
        fake = build(family)
        fake(*fake.example(2))["loss"].backward()


def test_bf16_autocast_stays_near_fp32():
    objective = build("swinv2")
    images, mask = objective.example(4)
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(images, mask)["loss"]
    torch.testing.assert_close(low, objective(images, mask)["loss"], rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(unit=24), "unit=24: visible_only needs a multiple of the encoder's stride 16; use 32"),
        (dict(img_size=72), "img_size=72: visible_only needs a multiple of unit 16; use 64 or 80"),
        (dict(img_size=(40, 64)), r"img_size=\[40, 64\]: visible_only needs .* use \[32, 64\] or \[48, 64\]"),
        (dict(decoder_depth=0), "decoder_depth=0: must be 1 or more"),
        (dict(decoder_dim=30), "decoder_dim=30: must be a multiple of 4; use 32"),
        (dict(decoder_num_heads=3), "decoder_num_heads=3: does not divide decoder_dim=16; use 2"),
        (dict(encoder=dict(name="vit_tiny", img_size=64)), "visible_only=true: vit has no windows"),
    ],
)
def test_mistakes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        if "encoder" in change:
            create_objective("simmim", **change, visible_only=True)
        build(**change)


def test_a_mask_that_shows_another_number_or_a_part_of_a_token_is_refused():
    objective = build()
    images, mask = objective.example(2)
    more, part = mask.clone(), mask.clone()
    more[0] = False
    row, column = mask[1].nonzero()[0].tolist()
    part[1, row, column] = False
    with pytest.raises(ValueError, match="mask: must show 6 of the 15 tokens of every image, each of 4 x 4"):
        objective(images, more)
    with pytest.raises(ValueError, match="mask: hides a part of a token; hide whole ones, of 4 x 4"):
        objective(images, part)
    with pytest.raises(ValueError, match="mask: hides all 15 tokens of an image"):
        objective.reconstruct(images, torch.ones_like(mask))


def test_a_mask_of_another_share_is_completed_as_by_the_objective_of_that_share():
    """One image of each count at once; the head alone knows no ratio, so the weights are the same."""
    objective, other = build("swinv2").eval(), build("swinv2", mask_ratio=0.3).eval()
    images, ids = torch.randn(2, 2, 48, 80), torch.arange(1)
    own, fewer = objective.random_mask(ids), other.random_mask(ids)
    assert own.sum() > fewer.sum()
    found = objective.reconstruct(images, torch.cat((own, fewer)))
    assert torch.equal(found[:1], objective.reconstruct(images[:1], own))
    assert torch.equal(found[1:], other.reconstruct(images[1:], fewer))


def test_a_picture_shows_what_is_predicted_of_hidden_pixels():
    objective = build(mean=(0.4, 0.5), std=(0.2, 0.3)).eval()
    images, mask = objective.example(2)
    picture = objective.picture(images, mask)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    scale, shift = (torch.tensor(values).view(2, 1, 1) for values in ((0.2, 0.3), (0.4, 0.5)))
    colours = (objective.reconstruct(images, mask) * scale + shift).clamp(0, 1)
    completed = picture.columns[-1].permute(0, 2, 3, 1)[hidden]
    torch.testing.assert_close(completed[:, 0], colours[:, 0][hidden])
