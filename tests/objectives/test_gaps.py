"""Float images of any number of bands, in which NaN is no data, against direct computations in float64."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmim.config import load_config
from fastmim.engine.build import make_schedule
from fastmim.engine.nonfinite import find_nonfinite
from fastmim.models import encoder_settings
from fastmim.objectives import create_objective
from fastmim.objectives.gaps import window_statistics
from fastmim.objectives.pictures import NO_DATA, stretched, to_rgb
from fastmim_kernels.local_norm.op import local_statistics

BANDS = 13
SWIN = dict(name="swinv2", img_size=32, in_chans=BANDS, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
VIT = dict(name="vit", img_size=32, in_chans=BANDS, patch_size=8, embed_dim=16, depth=1, num_heads=2)
VIT |= dict(abs_pos_embed="sincos", key_bias=True)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
SAMPLES = dict(mean=(300.0,) * BANDS, std=(50.0,), pixels="float32", has_gaps=True)


def gappy(batch=2, bands=BANDS, size=32):
    """Normalised images: single samples, whole pixels, a corner, one band of one image and no pixel but one missing."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, bands, size, size, generator=generator, dtype=torch.float64) * 2 + 1
    images[torch.rand(images.shape, generator=generator) < 0.1] = torch.nan
    images.masked_fill_(torch.rand(batch, 1, size, size, generator=generator) < 0.1, torch.nan)
    images[0, :, :11, :9] = torch.nan
    images[1, 2] = torch.nan
    images[1, 3, :, :], images[1, 3, 20, 21] = torch.nan, 1.5
    return images


def windowed(images, window):
    """Each pixel by numpy's moments of the valid ones around it; of one alone the deviation is 0."""
    padded = np.pad(images.numpy(), [(0, 0), (0, 0)] + [(window // 2,) * 2] * 2, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of windows with no or one valid pixel
        mean, variance = np.nanmean(around, (-2, -1)), np.nan_to_num(np.nanvar(around, (-2, -1), ddof=1))
    return torch.from_numpy((images.numpy() - mean) / np.sqrt(variance + 1e-6))


def patched(images, edge):
    """Each pixel by the moments of the valid ones of its patch, over all bands."""
    found = images.clone()
    for b in range(len(images)):
        for y in range(0, images.shape[2], edge):
            for x in range(0, images.shape[3], edge):
                here = (b, slice(None), slice(y, y + edge), slice(x, x + edge))
                valid = images[here][~images[here].isnan()]
                if len(valid) > 1:
                    found[here] = (images[here] - valid.mean()) / (valid.var() + 1e-6).sqrt()
    return found


def shuffled(tokens, head, edge):
    """(B, h, w, D) → (B, C, h·e, w·e), by the sizes of a linear head's output alone."""
    out = tokens @ head.weight.T + head.bias
    b, h, w, _ = out.shape
    return out.view(b, h, w, -1, edge, edge).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h * edge, w * edge)


def mean_error(function, prediction, target, scored):
    """Of what is scored and valid, band by band; NaN has no part in any gradient."""
    counts = scored.expand_as(target) & ~target.isnan()
    return function(prediction[counts] - target[counts]).mean()


def gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def same_gradients(objective, loss, expected, **tolerance):
    torch.testing.assert_close(loss, expected, **tolerance)
    own, direct = gradients(objective, loss), gradients(objective, expected)
    assert len(own) > 5 and own.keys() == direct.keys()
    for name, gradient in direct.items():
        torch.testing.assert_close(own[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(
    "own",
    [
        dict(),
        dict(loss="l2", head="mlp", loss_on="all"),
        dict(norm_target=5, loss="smooth_l1", beta=0.5),
        dict(norm_patch=True, visible_only=True, decoder_dim=8, decoder_num_heads=2),
    ],
    ids=str,
)
def test_simmim_scores_valid_pixels(own):
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder=SWIN, unit=8, **SAMPLES, **own).double()
    images, mask = gappy(), objective.random_mask(torch.arange(2))
    tokens = objective.head.tokens(objective._tokens(images.nan_to_num(0), mask))
    target = images
    if "norm_target" in own:
        target = windowed(images, own["norm_target"])
    if "norm_patch" in own:
        target = patched(images, objective.stride)
    beta = own.get("beta", 1)
    function = dict(
        l1=torch.abs,
        l2=torch.square,
        smooth_l1=lambda e: torch.where(e.abs() < beta, e**2 / (2 * beta), e.abs() - beta / 2),
    )[own.get("loss", "l1")]
    prediction = shuffled(tokens, objective.head, objective.head.stride)
    scored = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None] | (own.get("loss_on") == "all")
    loss = objective(images, mask)["loss"]
    expected = mean_error(function, prediction, target, scored)
    same_gradients(objective, loss, expected, rtol=1e-6, atol=1e-9)
    restored = objective.target.undo(target, images)
    torch.testing.assert_close(restored, images, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_mae_scores_valid_pixels(norm_pix_loss):
    torch.manual_seed(0)
    objective = create_objective("mae", encoder=VIT, norm_pix_loss=norm_pix_loss, **SAMPLES, **DECODER).double()
    images, mask = gappy(), objective.random_mask(torch.arange(2))
    keep, _, places = objective._split(images, mask, objective.kept)
    tokens = objective.decode(objective._encode(images.nan_to_num(0), keep), places)[:, 1:].unflatten(1, (4, 4))
    target = patched(images, 8) if norm_pix_loss else images
    prediction = shuffled(tokens, objective.decoder_pred, 8)
    scored = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    expected = mean_error(torch.square, prediction, target, scored)
    same_gradients(objective, objective(images, mask)["loss"], expected, rtol=1e-6, atol=1e-9)


NORMALISED = dict(simmim=dict(unit=8, norm_target=7), mae=dict(norm_pix_loss=True) | DECODER)


@pytest.mark.parametrize("name", NORMALISED)
def test_without_gaps_the_loss_is_that_of_the_fused_op(name):
    encoder = VIT if name == "mae" else SWIN
    losses = []
    for has_gaps in (False, True):
        torch.manual_seed(0)
        objective = create_objective(name, encoder=encoder, **SAMPLES | {"has_gaps": has_gaps}, **NORMALISED[name])
        images, mask = gappy().nan_to_num(1).float(), objective.random_mask(torch.arange(2))
        loss = objective(images, mask)["loss"]
        losses.append((loss.detach(), gradients(objective, loss)))
    (fused, first), (plain, second) = losses
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=0)
    for gradient in first:
        torch.testing.assert_close(second[gradient], first[gradient], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NORMALISED)
def test_nothing_valid_gives_no_loss_and_no_gradient(name):
    objective = create_objective(name, encoder=VIT if name == "mae" else SWIN, **SAMPLES, **NORMALISED[name])
    images = torch.full((2, BANDS, 32, 32), torch.nan)
    mask = objective.random_mask(torch.arange(2))
    loss = objective(images, mask)["loss"]
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(objective, loss).values())
    assert find_nonfinite(objective, images, mask) is None


def test_window_statistics_without_gaps_are_the_kernels():
    images = gappy().nan_to_num(3)
    for own, kernels in zip(window_statistics(images, 9), local_statistics(images, 9), strict=True):
        torch.testing.assert_close(own, kernels, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, own",
    [
        ("ibot", dict(out_dim=16, hidden_dim=16, bottleneck_dim=8, local_crops=0, augment=False)),
        ("dino", dict(out_dim=16, hidden_dim=16, bottleneck_dim=8, local_crops=0, augment=False)),
        ("moco", dict(out_dim=16, hidden_dim=16, augment=False)),
        ("classify", dict(num_classes=3, auto_augment="none")),
    ],
)
def test_others_see_the_mean_where_there_is_no_data(name, own):
    torch.manual_seed(0)
    objective = create_objective(name, encoder=VIT, **SAMPLES, **own).eval()
    images, ids = gappy().float(), torch.arange(2)
    mask = objective.random_mask(ids)
    loss = objective(images, mask)["loss"]
    assert loss.isfinite() and torch.equal(loss, objective(images.nan_to_num(0), mask)["loss"])
    views = objective.example(2)[0]
    assert all(view.dtype == torch.float32 for view in (views if isinstance(views, tuple) else [views]))


def test_pictures_stretch_bands_and_colour_gaps():
    objective = create_objective("simmim", encoder=SWIN, unit=8, **SAMPLES, bands=(4, 3, 1)).eval()
    images, mask = gappy().float(), objective.random_mask(torch.arange(2))
    image, masked, prediction, composite = objective.picture(images, mask).columns
    missing = images[:, [3, 2, 0]].isnan().any(1)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    rgb = images[:, [3, 2, 0]].double()
    mean = rgb.nanmean((2, 3), keepdim=True)
    std = (rgb - mean).square().nansum((2, 3), keepdim=True).div((~rgb.isnan()).sum((2, 3), keepdim=True) - 1).sqrt()
    seen = ((rgb - mean + 2 * std) / (4 * std)).clamp(0, 1).permute(0, 2, 3, 1).float()
    shown = [column.permute(0, 2, 3, 1) for column in (image, masked, prediction, composite)]
    torch.testing.assert_close(shown[0][~missing], seen[~missing])
    for column in (shown[0], shown[3]):
        assert (column[missing] == torch.tensor(NO_DATA)).all()
    assert (shown[1][hidden] == 0.5).all() and (shown[2][~hidden] == 0.5).all()
    assert torch.equal(stretched(images[:, :4]), stretched(images[:, :3]))  # the fourth band is no alpha
    assert torch.equal(stretched(images[:, :2]), stretched(images, (1,)))
    assert torch.equal(to_rgb(images[:, :5].nan_to_num(0), (2,)), images[:, 1:2].nan_to_num(0).expand(-1, 3, -1, -1))


FLOAT = ["model.in_chans=13", "data.pixels=float32", "data.mean=[7]", "data.std=[900]"]


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["objective.target=bins"], "objective.target=bins: of values in [0, 1], not of data.pixels=float32; use "),
        (["data.no_data=0", "objective.target_stride=4"], "objective.target_stride=4: not where pixels may be missing"),
        (["objective.name=dvae", "model.name=dvae"], "objective.name=dvae: learns images in [0, 1]"),
        (["objective.name=beit", "objective.tokenizer=t", "objective.jitter=0"], "objective.tokenizer=t: reads images"),
        (
            ["objective.name=ibot", "model.name=swin_tiny", "model.img_size=224"],
            "objective.augment=true: changes colours, which",
        ),
        (["objective.name=moco", "model.name=vit_small", "model.abs_pos_embed=sincos"], "objective.augment=true: "),
        (["objective.name=classify"], "objective.auto_augment=rand-m9-mstd0.5-inc1: changes colours"),
        (["output.bands=[1, 2]"], "output.bands=[1, 2]: give one channel (grey) or three"),
        (["output.bands=[14]"], "output.bands=[14]: the 13 channels are numbered from 1 to 13"),
    ],
)
def test_what_floats_cannot_do_is_refused_in_one_line(overrides, said):
    with pytest.raises(ValueError) as refused:
        load_config(None, [*FLOAT, *overrides])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_14_band_config_has_satvision_toas_settings():
    """pytorch-caney's configs/mim_pretrain_swinv2_satvision_giant_128_onecycle_100ep.yaml and modis_toa_scale.py."""
    cfg = load_config(Path(__file__).parents[2] / "configs/satellite/satvision_toa.yaml")
    model = encoder_settings(cfg.model.encoder_kwargs())
    sizes = dict(embed_dim=512, depths=(2, 2, 42, 2), num_heads=(16, 32, 64, 128), window_size=8, extra_norm_period=6)
    sizes |= dict(img_size=128, in_chans=14, patch_size=4)
    assert {key: model[key] for key in sizes} == sizes
    assert (cfg.objective.mask_ratio, cfg.objective.unit, cfg.train.epochs) == (0.6, 8, 50)
    schedule = make_schedule(cfg, 10, 512)
    assert [schedule(step) for step in (0, 150, 499)] == pytest.approx([2e-4, 3e-4, 2e-4], rel=1e-3)
    low, width = np.array(cfg.data.mean), np.array(cfg.data.std)
    largest = {0: 100, 5: 352.7182, 6: 100, 7: 261.2920, 13: 285.9848}
    scaled = [(value - low[band]) / width[band] for band, value in largest.items()]
    assert scaled == pytest.approx([1] * len(largest), abs=1e-6)
