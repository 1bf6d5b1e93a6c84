"""MAE against its definition: what the encoder sees, what the loss counts, official checkpoints."""

from __future__ import annotations

import pytest
import torch

from fastmim.interop import load_reference, load_weights
from fastmim.interop.mae import save_mae
from fastmim.objectives import create_objective
from fastmim.objectives.mae import patch_pixels
from fastmim.objectives.masks import split_patches
from fastmim.objectives.targets import PATCH_EPS

# 3 x 5 patches of a rectangle with two channels: rows are not columns, and int(15 · 0.3) is 4.
VIT = dict(name="vit", img_size=(24, 40), patch_size=8, in_chans=2, embed_dim=24, depth=2, num_heads=3, key_bias=True,
           abs_pos_embed="sincos", init="mae")  # fmt: skip
# The same patches as final tokens of 2 x 2 of its own; its windows do not divide them.
SWIN = dict(name="swin", img_size=(24, 40), patch_size=4, in_chans=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2),
            window_size=4)  # fmt: skip
ENCODERS = {"vit": VIT, "swin": SWIN, "swinv2": SWIN | dict(name="swinv2")}
DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)


def new(norm_pix_loss=True, seed=0, **changes):
    torch.manual_seed(seed)
    given = dict(encoder=VIT, mask_ratio=0.7, norm_pix_loss=norm_pix_loss, mean=(0.4, 0.5), std=(0.2, 0.3))
    return create_objective("mae", **given | DECODER | changes)


def batch(objective, size=3):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (size, 2, 24, 40), dtype=torch.uint8, generator=generator)
    return images, objective.random_mask(torch.arange(size) + 5, seed=1)


def squares(images):
    """(B, C, 24, 40) → (B, 15, 128) by loops."""
    rows = [images[:, :, y : y + 8, x : x + 8].flatten(1) for y in range(0, 24, 8) for x in range(0, 40, 8)]
    return torch.stack(rows, 1)


def tokens_hidden(mask, objective):
    """(B, 15) of a mask of the encoder's own patches."""
    repeat = objective.encoder.stride // objective.encoder.patch_size
    cells = mask[:, ::repeat, ::repeat]
    assert torch.equal(cells.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2), mask)
    return cells.flatten(1)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_is_the_mean_over_hidden_patches(norm_pix_loss, encoder):
    objective = new(norm_pix_loss, encoder=ENCODERS[encoder])
    images, mask = batch(objective)
    target = squares(objective.normalise(images)).double()
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + PATCH_EPS).sqrt()
    each = (squares(objective.reconstruct(images, mask)).double() - target).square().mean(-1)
    hidden = tokens_hidden(mask, objective)
    expected = (each * hidden).sum() / hidden.sum()
    for given in (images, objective.normalise(images)):
        assert objective(given, mask)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective(images, mask.float())["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_encoder_reads_visible_pixels_alone_and_their_order_does_not_matter():
    objective = new().eval()
    images, mask = batch(objective)
    seen = objective.normalise(images)
    wide = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    keep, hidden, places = split_patches(mask.flatten(1), objective.kept)
    latent = objective._encode(seen.masked_fill(wide, float("nan")), keep)
    assert torch.isfinite(latent).all()
    shuffle = torch.tensor([2, 0, 3, 1])
    other = objective._encode(seen, keep[:, shuffle])
    torch.testing.assert_close(other[:, 1:], latent[:, 1:][:, shuffle], rtol=0, atol=1e-5)
    moved = torch.full_like(places, -1).scatter(1, keep[:, shuffle], torch.arange(4).expand(3, -1))
    again = objective.decode(other, moved, hidden)
    torch.testing.assert_close(again, objective.decode(latent, places, hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_a_swin_reads_visible_pixels_alone_and_with_all_visible_is_the_plain_one(family):
    objective = new(encoder=ENCODERS[family]).eval()
    images, mask = batch(objective)
    seen, every = objective.normalise(images), torch.arange(15).expand(3, -1)
    plain = objective.encoder(seen).flatten(1, 2)
    expected = torch.cat((plain.mean(1, keepdim=True), plain), 1)
    torch.testing.assert_close(objective._encode(seen, every), expected, rtol=0, atol=1e-5)
    wide = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    prediction = objective.reconstruct(seen, mask)
    assert torch.equal(objective.reconstruct(seen.masked_fill(wide, float("nan")), mask), prediction)


def test_every_matrix_of_a_swin_learns():
    """DistributedDataParallel and ZeRO ask for a gradient of each."""
    objective = new(encoder=SWIN)
    objective(*batch(objective))["loss"].backward()
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert all(p.grad.abs().max() > 0 for p in trained if p.ndim > 1)
    assert "encoder.mask_token" not in dict(objective.named_parameters())


def test_the_decoder_makes_the_wanted_rows_of_all():
    objective = new().eval()
    images, mask = batch(objective)
    keep, hidden, places = split_patches(mask.flatten(1), objective.kept)
    latent = objective._encode(images, keep)
    whole = objective.decode(latent, places)[:, 1:]
    wanted = torch.stack([whole[b, row] for b, rows in enumerate(hidden) for row in rows])
    torch.testing.assert_close(objective.decode(latent, places, hidden), wanted, rtol=0, atol=1e-6)


def test_masks_hide_as_many_patches_of_every_image_and_follow_the_keys():
    objective = new()
    ids = torch.arange(400)
    mask = objective.random_mask(ids, seed=3, epoch=2)
    assert mask.shape == (400, 3, 5)
    assert mask.flatten(1).sum(1).eq(15 - 4).all()
    assert torch.equal(objective.random_mask(ids.flip(0)[:7], seed=3, epoch=2), mask.flip(0)[:7])
    assert not torch.equal(objective.random_mask(ids, seed=3, epoch=3), mask)
    share = mask.float().mean(0)
    assert (share - 11 / 15).abs().max() < 5 * (11 / 15 * 4 / 15 / 400) ** 0.5


def test_patches_are_those_of_the_mask():
    images = torch.randn(3, 2, 24, 40)
    numbers = torch.tensor([[0, 14], [7, 4], [9, 10]])
    found = patch_pixels(images, numbers, 8).flatten(2)
    wanted = squares(images)
    assert torch.equal(found, torch.stack([wanted[b, row] for b, row in enumerate(numbers)]))


def test_a_picture_undoes_the_normalisation_of_its_patches():
    """A prediction that is the target gives the image back, squares of one value too."""
    objective = new()
    images, mask = batch(objective)
    images[0, :, :8, :8] = 7
    seen = objective.normalise(images)
    each = squares(seen)
    target = (each - each.mean(-1, keepdim=True)) / (each.var(-1, keepdim=True) + PATCH_EPS).sqrt()
    shown = target.unflatten(1, (3, 5)).unflatten(3, (2, 8, 8)).permute(0, 3, 1, 4, 2, 5).reshape(3, 2, 24, 40)
    objective.reconstruct = lambda images, mask: shown
    torch.testing.assert_close(objective.reconstruct_pixels(images, mask), seen, rtol=0, atol=1e-5)
    picture = objective.picture(images, mask)
    assert picture.headings == ("image", "masked", "prediction", "composite")
    torch.testing.assert_close(picture.columns[3], picture.columns[0], rtol=0, atol=1e-5)


def test_tokens_decay_with_parity_and_positions_are_in_no_group():
    objective = new()
    decays = {
        policy: {
            name for group in objective.groups(0.05, policy) if group["weight_decay"] for name in group["param_names"]
        }
        for policy in ("parity", "default")
    }
    tokens = {"encoder.cls_token", "mask_token"}
    assert tokens <= decays["parity"] and not tokens & decays["default"]
    assert all("weight" in name for name in decays["parity"] - tokens)
    every = {name for group in objective.groups(0.05, "parity") for name in group["param_names"]}
    assert {n for n, _ in objective.named_parameters()} - every == {"encoder.pos_embed", "decoder_pos_embed"}


def official_names(depth, decoder_depth):
    """Of facebookresearch/mae, models_mae.MaskedAutoencoderViT."""
    parts = [
        f"{p}.{k}"
        for p in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for k in ("weight", "bias")
    ]
    names = [f"blocks.{i}.{p}" for i in range(depth) for p in parts]
    names += [f"decoder_blocks.{i}.{p}" for i in range(decoder_depth) for p in parts]
    single = ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
    names += [f"{p}.{k}" for p in single for k in ("weight", "bias")]
    return {*names, "cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}


def test_official_checkpoints_go_out_and_in(tmp_path):
    source, target = new(), new(seed=1)
    images, mask = batch(source)
    saved = save_mae(source)
    assert set(saved["model"]) == official_names(2, 2)
    # There the channels of a pixel lie side by side: row (y, x, c) of the prediction.
    ours = source.decoder_pred.bias.detach().view(2, 8, 8)
    assert torch.equal(saved["model"]["decoder_pred.bias"].view(8, 8, 2)[3, 5], ours[:, 3, 5])
    load_reference(target, saved)
    assert torch.equal(target(images, mask)["loss"], source(images, mask)["loss"])
    torch.save(saved | {"optimizer": {}, "epoch": 3}, tmp_path / "checkpoint-3.pth")
    load_weights(again := new(seed=2), tmp_path / "checkpoint-3.pth")
    assert torch.equal(again(images, mask)["loss"], source(images, mask)["loss"])


def test_the_encoder_of_an_official_checkpoint_goes_into_another_objective(tmp_path):
    torch.save(save_mae(source := new()), tmp_path / "mae.pth")
    learned = dict(VIT, abs_pos_embed=True, init="timm")
    target = create_objective("simmim", encoder=learned, unit=8, mean=(0.4, 0.5), std=(0.2, 0.3))
    report = load_weights(target, tmp_path / "mae.pth")
    assert "decoder_pred.weight" in report.skipped and "encoder.mask_token" in report.initialised
    images = torch.randn(2, 2, 24, 40)
    torch.testing.assert_close(target.encoder(images), source.encoder(images))


def test_a_checkpoint_without_a_decoder_is_refused_in_one_line(tmp_path):
    weights = {k: v for k, v in save_mae(new())["model"].items() if "decoder" not in k and k != "mask_token"}
    with pytest.raises(ValueError, match="holds no decoder, as the checkpoints for fine-tuning do"):
        load_reference(new(), {"model": weights})
    half = save_mae(new())["model"]
    del half["decoder_norm.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(decoder_norm.bias\)"):
        load_reference(new(), half)
    # To train on from, it is enough: the decoder is new then.
    torch.save(weights, tmp_path / "encoder.pth")
    assert "decoder_pred.weight" in load_weights(new(), tmp_path / "encoder.pth").initialised


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(mask_ratio=1.0), "mask_ratio=1.0: must hide some of the 15 patches and leave some visible"),
        (dict(mask_ratio=0.99), "mask_ratio=0.99: must hide"),
        (
            dict(encoder=SWIN | dict(img_size=(24, 36))),
            r"img_size=\[24, 36\]: MAE needs a multiple of the encoder's stride 8",
        ),
        (dict(encoder=dict(name="swin", img_size=32)), "mask_ratio=0.7: must hide some of the 1 patches"),
        (dict(encoder=VIT | dict(abs_pos_embed=False)), "abs_pos_embed=false: the ViT would not know"),
        (dict(encoder=VIT | dict(rel_pos_bias=True)), "rel_pos_bias=true: not with MAE"),
        (dict(decoder_embed_dim=18), "decoder_embed_dim=18: not a multiple of 4, .* use 16 or 20"),
        (dict(decoder_num_heads=3), "decoder_num_heads=3: 3 does not divide the 16 channels"),
        (dict(decoder_depth=0), "decoder_depth=0: must be at least 1"),
    ],
)
def test_mistakes_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        new(**changes)


def test_a_mask_of_another_count_is_refused():
    objective = new()
    images, mask = batch(objective)
    mask[1, 0] = True
    with pytest.raises(ValueError, match=r"mask: must show 4 of the 15 tokens of every image, .* got \[\d, 4\]"):
        objective(images, mask)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_mask_of_another_count_is_completed_as_by_the_objective_of_that_ratio(encoder):
    """Whose loss of that image is the error of the completed patches; nothing that is learnt knows the ratio."""
    objective, other = (new(False, encoder=ENCODERS[encoder], mask_ratio=ratio).eval() for ratio in (0.7, 0.3))
    images = objective.normalise(batch(objective, 2)[0])
    masks = torch.cat([one.random_mask(torch.arange(1)) for one in (objective, other)])
    hidden = tokens_hidden(masks, objective)
    assert hidden.sum(1).tolist() == [11, 5]
    each = (squares(objective.reconstruct(images, masks)) - squares(images)).square().mean(-1)
    for i, one in enumerate((objective, other)):
        loss = one(images[i : i + 1], masks[i : i + 1])["loss"]
        torch.testing.assert_close(each[i][hidden[i]].mean(), loss)


@pytest.mark.parametrize("encoder, backend", [("vit", "aot_eager"), ("swinv2", "eager")])
def test_compiles_as_one_graph(encoder, backend):
    objective = new(encoder=ENCODERS[encoder])
    images, mask = batch(objective)
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images, mask)["loss"], objective(images, mask)["loss"])
