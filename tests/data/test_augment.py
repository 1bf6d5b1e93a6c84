"""The augmentation's statistics against its definition, and its pixels against torchvision."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from fastmim.data.augment import Crop, View, apply_crop, centre_crop, check_views, draw_crop, draw_crops
from fastmim.data.decode import decode_image
from fastmim.data.order import augment_random

SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)
NUM = 4000
#: Kolmogorov-Smirnov distance that NUM right draws exceed with probability 1e-6 (2 exp(-2 n d^2)).
KS_BOUND = math.sqrt(-math.log(1e-6 / 2) / (2 * NUM))


def boxes(height: int, width: int, scale=SCALE, ratio=RATIO, hflip=0.5) -> np.ndarray:
    """(NUM, 5) crops of samples 0 … of epoch 3, as the loader draws them."""
    options = {"scale": scale, "ratio": ratio, "hflip": hflip}
    return np.array([draw_crop(height, width, rng=augment_random(11, 3, i), **options) for i in range(NUM)])


def ks(values: np.ndarray, cdf) -> float:
    values = np.sort(values)
    expected, steps = cdf(values), np.arange(len(values) + 1) / len(values)
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def uniform_cdf(low: float, high: float):
    return lambda x: np.clip((x - low) / (high - low), 0, 1)


def test_area_and_aspect_where_every_box_fits():
    # scale up to 0.3 of a square: no box is refused, so both marginals are exactly the stated ones; 4000 px
    # make the rounding to whole pixels (1/1000) small against the bound (0.04)
    drawn = boxes(4000, 4000, scale=(0.05, 0.3))
    height, width = drawn[:, 2].astype(float), drawn[:, 3].astype(float)
    area, log_aspect = height * width / 4000**2, np.log(width / height)
    assert ks(area, uniform_cdf(0.05, 0.3)) < KS_BOUND
    assert ks(log_aspect, uniform_cdf(math.log(3 / 4), math.log(4 / 3))) < KS_BOUND
    assert abs(np.corrcoef(area, log_aspect)[0, 1]) < 5 / math.sqrt(NUM)
    for start, room in ((drawn[:, 0], 4000 - height), (drawn[:, 1], 4000 - width)):
        assert ks((start + 0.5) / (room + 1), uniform_cdf(0, 1)) < KS_BOUND


@pytest.mark.parametrize(("height", "width"), ((3000, 3000), (3000, 4000), (3600, 3000)))
def test_area_and_aspect_of_simmim_boxes(height, width):
    # With scale (0.67, 1) many boxes do not fit and are drawn again: the distribution is the uniform one
    # restricted to the boxes that fit, here integrated on a grid.
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    middle = (np.arange(1200) + 0.5) / 1200
    area, log_aspect = np.meshgrid(
        SCALE[0] + (SCALE[1] - SCALE[0]) * middle, log_low + (log_high - log_low) * middle, indexing="ij"
    )
    w = np.sqrt(area * height * width * np.exp(log_aspect))
    h = np.sqrt(area * height * width / np.exp(log_aspect))
    fits = (w <= width + 0.5) & (h <= height + 0.5)
    refused_ten_times = (1 - fits.mean()) ** 10

    def cdf_of(grid, axis):
        mass = fits.sum(axis=1 - axis) / fits.sum()
        points = grid[:, 0] if axis == 0 else grid[0]
        return lambda x: np.interp(x, points, np.cumsum(mass) - mass / 2)

    drawn = boxes(height, width)
    box_h, box_w = drawn[:, 2].astype(float), drawn[:, 3].astype(float)
    assert (drawn[:, 0] + box_h <= height).all() and (drawn[:, 1] + box_w <= width).all()
    bound = KS_BOUND + refused_ten_times + 2e-3  # + the grid's own resolution
    assert ks(box_h * box_w / (height * width), cdf_of(area, 0)) < bound
    assert ks(np.log(box_w / box_h), cdf_of(log_aspect, 1)) < bound


@pytest.mark.parametrize("rate", (0.0, 0.5, 0.2, 1.0))
def test_flip_rate(rate):
    flips = boxes(100, 100, hflip=rate)[:, 4].sum()
    assert abs(flips - NUM * rate) <= 5 * math.sqrt(NUM * rate * (1 - rate))


@pytest.mark.parametrize(("height", "width"), ((300, 400), (64, 64), (1000, 30), (30, 1000)))
def test_boxes_are_torchvisions_for_the_same_random_numbers(monkeypatch, height, width):
    transform = v2.RandomResizedCrop(32, scale=SCALE, ratio=RATIO)
    image, equal = torch.empty(3, height, width), 0
    for i in range(300):
        ours = draw_crop(height, width, scale=SCALE, ratio=RATIO, hflip=0.5, rng=augment_random(0, 0, i))
        same = augment_random(0, 0, i)

        def uniform(tensor, low, high, rng=same):
            return tensor.fill_(rng.uniform(float(low), float(high)))

        def randint(low, high, size, rng=same):
            return torch.tensor([low + int(rng.random() * (high - low))])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform)
            patch.setattr(torch, "randint", randint)
            theirs = transform.make_params([image])
        theirs = (theirs["top"], theirs["left"], theirs["height"], theirs["width"])
        # torchvision keeps its draws in float32: a side may round the other way
        assert max(abs(a - b) for a, b in zip(ours[:4], theirs, strict=True)) <= 1
        equal += ours[:4] == theirs
    assert equal >= 297


@pytest.fixture(scope="module")
def photo(make) -> tuple[bytes, Image.Image]:
    rgb = make["smooth_rgb"](230, 310, 2).astype(int)
    noisy = rgb + np.random.default_rng(0).integers(-40, 41, rgb.shape)  # resizing must average something
    data = make["encode"](Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=95)
    return data, Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic"))
@pytest.mark.parametrize("loader", ("auto", "pil"))
def test_pixels_against_torchvision_with_the_same_boxes(photo, interpolation, loader):
    data, pil = photo
    image, mode = decode_image(data, loader=loader), v2.InterpolationMode(interpolation)
    for i in range(20):
        crop = draw_crop(230, 310, scale=(0.2, 1.0), ratio=RATIO, hflip=0.5, rng=augment_random(1, 1, i))
        ours = apply_crop(image, crop, (96, 128), interpolation).int()
        args = (*crop[:4], [96, 128], mode, True)
        in_pil = tv.pil_to_tensor(tv.resized_crop(pil, *args)).int()
        in_torch = tv.resized_crop(tv.pil_to_tensor(pil), *args).int()
        if crop.flip:
            in_pil, in_torch = in_pil.flip(-1), in_torch.flip(-1)
        # the same kernel on the same decoded pixels: one level for another JPEG library
        assert (ours - in_torch).abs().max() <= 1
        # PIL's kernel rounds (bicubic: also clips) its 8-bit intermediate rows elsewhere, without bias
        difference = ours - in_pil
        assert difference.abs().max() <= (2 if interpolation == "bilinear" else 4)
        assert difference.float().mean().abs() < 0.05


@pytest.mark.parametrize("side", (64, 224, 320))
def test_validation_crop_is_torchvisions(photo, side):
    image = decode_image(photo[0])
    for view in (image, image.transpose(1, 2), image[:, :, :230]):
        theirs = v2.CenterCrop(side)(v2.Resize(side, antialias=True)(view))
        assert torch.equal(centre_crop(view, (side, side), "bilinear"), theirs)


def test_validation_crop_of_a_rectangle_covers_it():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)
    out = centre_crop(ramp, (50, 25), "bilinear")  # scaled to 50 x 100, the middle quarter is kept
    assert out.shape == (3, 50, 25)
    assert abs(out[0, 0, 0].item() - 76) <= 2 and abs(out[0, 0, -1].item() - 124) <= 2
    assert centre_crop(ramp, (25, 190), "bilinear").shape == (3, 25, 190)


def test_sources_smaller_than_the_target_and_extreme_shapes():
    for height, width in ((8, 8), (1, 500), (500, 1), (8, 3000)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        crop = draw_crop(height, width, scale=SCALE, ratio=RATIO, hflip=0.5, rng=augment_random(0, 0, 0))
        assert crop.height >= 1 and crop.width >= 1
        assert apply_crop(image, crop, (32, 48), "bicubic").shape == (3, 32, 48)
    assert isinstance(crop, Crop)


def test_two_views_of_one_crop():
    small = View((16, 16), 2, same_crop=True, interpolation="lanczos")
    views = (View((32, 32), 2), small, View((8, 8), scale=(0.1, 0.2)))
    drawn = draw_crops(views, 90, 70, augment_random(1, 2, 3))
    assert drawn[2:4] == drawn[:2] and drawn[0] != drawn[1]
    # The view takes no draws: those after it are as without it.
    assert draw_crops((views[0], views[2]), 90, 70, augment_random(1, 2, 3)) == drawn[:2] + drawn[4:]
    for wrong in (views[1:], (views[0], View((16, 16), same_crop=True))):
        with pytest.raises(ValueError, match="same_crop=True: needs a view before it"):
            check_views(wrong)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lanczos_is_pils(channels):
    generator = torch.Generator().manual_seed(channels)
    image = torch.randint(0, 256, (channels, 50, 60), dtype=torch.uint8, generator=generator)
    ours = apply_crop(image, Crop(3, 5, 40, 44, True), (16, 12), "lanczos")
    box = image[:, 3:43, 5:49].permute(1, 2, 0).squeeze(-1).numpy()
    theirs = np.asarray(Image.fromarray(box).resize((12, 16), Image.Resampling.LANCZOS))
    theirs = theirs[:, ::-1].reshape(16, 12, channels).transpose(2, 0, 1)
    # Of RGBA, PIL weighs the colours by alpha: every channel of ours is filtered alone.
    kept = slice(3, 4) if channels == 4 else slice(None)
    assert np.array_equal(ours.numpy()[kept], theirs[kept])
