"""Photometric augmentation: pixels beside torchvision's and PIL's, draws beside their distributions, and their keys."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as pil_tv
from torchvision.transforms.v2 import functional as tv

import fastmim_kernels as fk
from fastmim.data.augment import View as LoaderView
from fastmim.objectives.photometric import Draws, Photometric, apply_draws, draw, photometric
from fastmim.objectives.views import View, augmented

EVERYTHING = Photometric(jitter_p=1, grey_p=1, blur_p=1, solarize_p=1)
NOTHING = Photometric(jitter_p=0, grey_p=0, blur_p=0, solarize_p=0)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
ORDERS = list(permutations(range(4)))


def pictures(count, height=40, width=48, seed=0):
    """Half smooth, half black and white noise: large areas of in-between values, and every edge and corner there is."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    smooth = F.interpolate(smooth, (height, width), mode="bicubic").clamp(0, 1).mul(255).round().byte()
    noise = torch.randint(0, 2, (count, 3, height, width), generator=generator).mul(255).byte()
    return torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, smooth, noise)


def draws(count, factors=NEUTRAL, rank=(0, 1, 2, 3), grey=False, sigma=0.0, threshold=256):
    """One decision for all rows."""
    return Draws(
        torch.tensor([factors] * count),
        torch.tensor([rank] * count),
        torch.full((count,), grey),
        torch.full((count,), sigma),
        torch.full((count,), threshold, dtype=torch.int16),
    )


def through_pil(images, operation):
    done = (operation(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in done])


JITTERS = [
    *((0, factor) for factor in (0.6, 0.93, 1.4)),
    *((1, factor) for factor in (0.6, 1.4)),
    *((2, factor) for factor in (0.0, 0.8, 1.2)),
    *((3, factor) for factor in (-0.5, -0.1, 0.03, 0.1, 0.5)),
]
TV = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
PIL = (pil_tv.adjust_brightness, pil_tv.adjust_contrast, pil_tv.adjust_saturation, pil_tv.adjust_hue)


@pytest.mark.parametrize("index, factor", JITTERS)
def test_each_jitter_is_torchvisions(index, factor):
    """To half a level of 255, which one rounding costs, and torchvision's .2989 for .299 of red; PIL cuts off, too."""
    images = pictures(6)
    factors = list(NEUTRAL)
    factors[index] = factor
    ours = apply_draws(images, draws(6, tuple(factors)), EVERYTHING).float()
    assert (ours - TV[index](images / 255, factor) * 255).abs().max() <= 0.53
    far = ours - through_pil(images, lambda image: PIL[index](image, factor))
    assert far.abs().max() <= (15 if index == 3 else 2)  # PIL's hues, saturations and values are of 8 bits
    assert far.abs().mean() <= (2 if index == 3 else 1)


def test_grey_and_solarisation_are_pils():
    images = pictures(6)
    far = apply_draws(images, draws(6, grey=True), EVERYTHING).int() - through_pil(
        images, lambda image: pil_tv.rgb_to_grayscale(image, 3)
    )
    assert far.abs().max() <= 1 and far.abs().float().mean() < 0.01
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for threshold in (0, 1, 90, 128, 255, 256):
        ours = apply_draws(levels, draws(1, threshold=threshold), EVERYTHING)
        assert torch.equal(ours, through_pil(levels, lambda image, t=threshold: ImageOps.solarize(image, t)))


@pytest.mark.parametrize("shape", [(40, 48), (5, 1), (2, 9)])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.41, 1.42, 2.0])
def test_blur_is_pils(sigma, shape):
    """Its six passes round to whole levels, ours do not: 3 levels apart at most, on edges and in tiny images too."""
    images = pictures(6, *shape)
    far = apply_draws(images, draws(6, sigma=sigma), EVERYTHING).int() - through_pil(
        images, lambda image: image.filter(ImageFilter.GaussianBlur(sigma))
    )
    assert far.abs().max() <= 3


def test_blur_spreads_by_sigma():
    """It adds sigma² to the variance of a stripe, beyond the usual two pixels as well; nothing gets lost."""
    how = replace(EVERYTHING, blur_sigma=(0.1, 4.0))
    stripe = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    stripe[..., 27:38] = 255
    place = torch.arange(65.0) - 32
    for sigma in (1.0, 2.0, 3.5):
        for image in (stripe, stripe.mT):
            profile = apply_draws(image, draws(1, sigma=sigma), how)[0, 0].double().mean(0 if image is stripe else 1)
            variance = (profile * place**2).sum() / profile.sum() - (11**2 - 1) / 12
            assert abs(variance - sigma**2) < 0.05 * sigma**2
            assert abs(profile.sum() - 11 * 255) < 5


def test_chains_in_every_order_are_torchvisions_in_floats():
    """One batch holds all 24 orders, with and without grey: as exact as a single operation, for nothing is rounded."""
    count = 2 * len(ORDERS)
    images = pictures(count, 24, 24)
    generator = torch.Generator().manual_seed(1)
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    factors = low + (high - low) * torch.rand(count, 4, generator=generator)
    rank = torch.tensor(ORDERS * 2)
    some = draws(count)._replace(factors=factors, rank=rank, grey=torch.arange(count) >= len(ORDERS))
    ours = apply_draws(images, some, EVERYTHING)
    for i in range(count):
        x = images[i] / 255
        for index in rank[i].argsort().tolist():
            x = TV[index](x, float(factors[i, index]))
        x = tv.rgb_to_grayscale(x, 3) if some.grey[i] else x
        # Where the hue jumps, at grey, the difference of torchvision's weights can choose a side.
        far = (ours[i] - x * 255).abs()
        assert far.max() <= 0.65


def test_whole_chains_beside_pil():
    """What PIL cuts off makes it a level darker, its hues of 8 bits make most of the rest."""
    how = Photometric(blur_p=0.5, solarize_p=0.2)
    images, ids = pictures(64), torch.arange(64)
    some = draw(ids, seed=3, epoch=1, crop=1, how=how)
    ours = photometric(images, ids, seed=3, epoch=1, crop=1, how=how)

    def reference(i, image):
        if some.factors[i].tolist() != list(NEUTRAL):
            for index in some.rank[i].argsort().tolist():
                image = PIL[index](image, float(some.factors[i, index]))
        image = pil_tv.rgb_to_grayscale(image, 3) if some.grey[i] else image
        image = image.filter(ImageFilter.GaussianBlur(float(some.sigma[i]))) if some.sigma[i] else image
        return ImageOps.solarize(image, int(some.threshold[i]))

    theirs = torch.cat([through_pil(images[i : i + 1], lambda image, i=i: reference(i, image)) for i in range(64)])
    far = ours.float() - theirs
    upright = some.threshold == 256
    assert 0.2 < far[upright].mean() < 1.5
    assert far.abs().mean() < 1.7 and far.abs().max() <= 24


def test_draws_follow_the_published_distributions():
    """Frequencies to four standard errors, values by Kolmogorov's and Smirnov's distance, orders by chi-square."""
    how, count = Photometric(blur_p=0.1, solarize_p=0.2), 20000
    some = draw(torch.arange(count), seed=0, epoch=0, crop=1, how=how)
    jittered = some.factors[:, 0] != 1
    for found, p in ((jittered, 0.8), (some.grey, 0.2), (some.sigma > 0, 0.1), (some.threshold == 128, 0.2)):
        assert abs(found.double().mean() - p) < 4 * (p * (1 - p) / count) ** 0.5
    neutral = torch.tensor(NEUTRAL)
    assert (some.factors[~jittered] == neutral).all() and (some.threshold[some.threshold != 128] == 256).all()
    values = {
        "brightness": (some.factors[jittered, 0], 0.6, 1.4),
        "contrast": (some.factors[jittered, 1], 0.6, 1.4),
        "saturation": (some.factors[jittered, 2], 0.8, 1.2),
        "hue": (some.factors[jittered, 3], -0.1, 0.1),
        "sigma": (some.sigma[some.sigma > 0], 0.1, 2.0),
    }
    for name, (found, low, high) in values.items():
        found = ((found.double() - low) / (high - low)).sort().values
        steps = torch.linspace(0, 1, len(found) + 1, dtype=torch.float64)
        distance = torch.maximum((steps[1:] - found).max(), (found - steps[:-1]).max())
        assert distance * len(found) ** 0.5 < 1.95, name  # p = .001
    codes = (some.rank[jittered] * torch.tensor([64, 16, 4, 1])).sum(1)
    orders = codes.unique(return_counts=True)[1]
    expected = len(codes) / 24
    assert len(orders) == 24 and ((orders - expected) ** 2 / expected).sum() < 49.7  # p = .001 at 23 degrees


def test_draws_are_independent_of_each_other_and_of_other_crops():
    """No two of them are correlated: within a crop, nor with another crop or epoch of the same samples."""
    how, ids = Photometric(jitter_p=1, blur_p=0.5, solarize_p=0.5, grey_p=0.5), torch.arange(20000)
    columns = []
    for epoch, crop in ((0, 1), (0, 2), (1, 1)):
        some = draw(ids, seed=0, epoch=epoch, crop=crop, how=how)
        columns += [*some.factors.unbind(1), *some.rank[:, :3].unbind(1), some.grey, some.sigma > 0, some.threshold]
    found = torch.corrcoef(torch.stack([column.double() for column in columns]))
    own = torch.block_diag(*[torch.eye(4), torch.ones(3, 3), torch.eye(3)] * 3) > 0  # the places of an order exclude
    assert found[~own].abs().max() * len(ids) ** 0.5 < 4.5
    blurred = draw(ids, seed=0, epoch=0, crop=1, how=replace(how, blur_p=1.0)).sigma.double()
    assert abs(torch.corrcoef(torch.stack([blurred, columns[8].double()]))[0, 1]) * len(ids) ** 0.5 < 4


def test_factors_stay_in_torchvisions_ranges():
    """A strength above 1 draws from 0 on, not from a negative factor."""
    strong = replace(EVERYTHING, jitter=(2.0, 1.0, 0.5, 0.5), blur_sigma=(1.0, 1.0))
    some = draw(torch.arange(3000), seed=0, epoch=0, crop=0, how=strong)
    bounds = zip(some.factors.amin(0), some.factors.amax(0), ((0, 3), (0, 2), (0.5, 1.5), (-0.5, 0.5)), strict=True)
    for low, high, (least, most) in bounds:
        assert least <= low < least + 0.01 and most - 0.01 < high <= most
    assert (some.sigma == 1).all()


def test_a_row_depends_on_its_pixels_and_keys_alone():
    """To the bit, in any company: sizes that fill no vector, rows that want all and rows that want nothing."""
    how = Photometric(solarize_p=0.3)
    images, ids = pictures(30, 33, 47), torch.arange(30) * 7919
    batch = photometric(images, ids, seed=1, epoch=2, crop=3, how=how)
    for i in range(30):
        alone = photometric(images[i : i + 1], ids[i : i + 1], seed=1, epoch=2, crop=3, how=how)
        assert torch.equal(alone[0], batch[i])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(photometric(images[order], ids[order], seed=1, epoch=2, crop=3, how=how), batch[order])
    crops = torch.arange(30) % 4
    mixed = photometric(images, ids.int(), seed=1, epoch=2, crop=crops, how=how)
    assert torch.equal(mixed[crops == 3], batch[crops == 3]) and not torch.equal(mixed, batch)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(photometric(strided, ids, seed=1, epoch=2, crop=3, how=how), batch)
    for other in (dict(seed=2), dict(epoch=3), dict(crop=2)):
        assert not torch.equal(photometric(images, ids, **dict(seed=1, epoch=2, crop=3) | other, how=how), batch)


def test_a_row_beside_one_whose_hue_turns():
    """Halves of levels show what the slightest change before rounding makes of them."""
    images = pictures(2, 64, 64)
    some = draws(2)._replace(factors=torch.tensor([(0.5, 1, 1, 0), (0.5, 1, 1, 0.1)]))
    alone = apply_draws(images[:1], Draws(*(column[:1] for column in some)), EVERYTHING)
    assert torch.equal(apply_draws(images, some, EVERYTHING)[:1], alone)


def test_a_device_that_cannot_look_at_draws_gives_the_same(monkeypatch):
    """There every row runs through every step, and nothing reads a value."""
    how = Photometric(solarize_p=0.3)
    images, ids = pictures(40, 33, 47), torch.arange(40)
    looked = photometric(images, ids, seed=0, epoch=0, crop=0, how=how)
    bare = photometric(images, ids, seed=0, epoch=0, crop=0, how=NOTHING)
    with monkeypatch.context() as patch:
        patch.setattr(fk, "shape_may_follow", lambda data: False)
        assert torch.equal(photometric(images, ids, seed=0, epoch=0, crop=0, how=how), looked)
        assert torch.equal(photometric(images, ids, seed=0, epoch=0, crop=0, how=NOTHING), images)
    assert torch.equal(bare, images)
    meta = photometric(images.to("meta"), ids.to("meta"), seed=0, epoch=0, crop=0, how=how)  # has no values
    assert meta.is_meta and meta.shape == images.shape and meta.dtype == torch.uint8


@pytest.mark.cuda
def test_a_gpu_draws_the_same_and_never_waits():
    """Pixels differ by a level at most, and seldom: sums of means have another order there."""
    how = Photometric(solarize_p=0.3)
    images, ids = pictures(40, 33, 47), torch.arange(40)
    on_cpu = photometric(images, ids, seed=0, epoch=0, crop=0, how=how)
    there, where = images.cuda(), ids.cuda()
    photometric(there, where, seed=0, epoch=0, crop=0, how=how)  # the first use of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        some = draw(where, seed=0, epoch=0, crop=0, how=how)
        on_gpu = photometric(there, where, seed=0, epoch=0, crop=0, how=how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(draw(ids, seed=0, epoch=0, crop=0, how=how), some, strict=True):
        assert torch.equal(ours, theirs.cpu())
    far = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert far.max() <= 1 and far.float().mean() < 0.01


def test_another_strength_leaves_the_other_draws_alone():
    ids = torch.arange(50)
    one = draw(ids, seed=0, epoch=0, crop=0, how=Photometric())
    other = draw(ids, seed=0, epoch=0, crop=0, how=Photometric(jitter=(0.8, 0.4, 0.2, 0.1), grey_p=0.9, solarize_p=1))
    assert torch.equal(one.factors[:, 1:], other.factors[:, 1:]) and torch.equal(one.sigma, other.sigma)
    assert torch.equal(one.rank, other.rank) and not torch.equal(one.factors, other.factors)


def test_one_channel_is_a_grey_image():
    """What a channel becomes is what three equal ones become: no colour to turn, saturate or take away."""
    how = Photometric(solarize_p=0.3)
    grey, ids = pictures(20)[:, :1], torch.arange(20)
    ours = photometric(grey, ids, seed=0, epoch=0, crop=0, how=how)
    colours = photometric(grey.expand(-1, 3, -1, -1), ids, seed=0, epoch=0, crop=0, how=how)
    assert ours.shape == grey.shape and (ours.int() - colours.int()).abs().max() <= 1
    assert not torch.equal(ours, grey)


def test_no_image():
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert photometric(empty, torch.arange(0), seed=0, epoch=0, crop=0, how=EVERYTHING).shape == empty.shape


@pytest.mark.parametrize("shape, dtype, ids, message", [
    ((2, 3, 8, 8), torch.float32, 2, "images must be uint8 .*got torch.float32"),
    ((2, 4, 8, 8), torch.uint8, 2, r"C 3 \(colours\) or 1 \(grey\), got torch.uint8 \(2, 4, 8, 8\)"),
    ((3, 8, 8), torch.uint8, 3, "images must be uint8"),
    ((2, 3, 8, 8), torch.uint8, 3, "one id per image: 3 for 2"),
])  # fmt: skip
def test_wrong_images_are_refused(shape, dtype, ids, message):
    with pytest.raises(ValueError, match=message):
        photometric(torch.zeros(shape, dtype=dtype), torch.arange(ids), seed=0, epoch=0, crop=0, how=EVERYTHING)


@pytest.mark.parametrize("value", [
    dict(jitter=(0.4, 0.4, 0.2)), dict(jitter=(-0.1, 0, 0, 0)), dict(jitter=(0, 0, 0, 0.6)), dict(jitter_p=1.1),
    dict(grey_p=-0.1), dict(blur_p=2), dict(solarize_p=2), dict(blur_sigma=(2.0, 0.1)), dict(blur_sigma=(-1.0, 1.0)),
    dict(solarize_threshold=257), dict(solarize_threshold=-1),
])  # fmt: skip
def test_wrong_settings_are_refused(value):
    with pytest.raises(ValueError, match=f"^{next(iter(value))}="):
        Photometric(**value)


def test_crops_of_all_views_draw_their_own():
    local, last = Photometric(blur_p=0.5), Photometric(blur_p=1.0)
    views = View((16, 16), 3, photometric=local), View((24, 24)), View((24, 24), photometric=last)
    ids = torch.tensor([5, 9])
    images = tuple(pictures(v.count * 2, *v.size).unflatten(0, (v.count, 2)) for v in views)
    done = augmented(images, views, ids, seed=1, epoch=2)
    for i in range(3):
        assert torch.equal(done[0][i], photometric(images[0][i], ids, seed=1, epoch=2, crop=i, how=local))
    assert done[1] is images[1]
    assert torch.equal(done[2][0], photometric(images[2][0], ids, seed=1, epoch=2, crop=4, how=last))
    single = images[0][0]
    alone = augmented(single, (replace(views[0], count=1),), ids, seed=1, epoch=2)
    assert torch.equal(alone, done[0][0])
    assert augmented(single, (View((16, 16)),), ids, seed=1, epoch=2) is single


def test_the_loader_is_not_asked_for_colours():
    view = View((24, 24), 2, scale=(0.2, 1.0), photometric=Photometric())
    assert LoaderView(**view.over({"hflip": 0.5})) == LoaderView((24, 24), 2, scale=(0.2, 1.0), hflip=0.5)
