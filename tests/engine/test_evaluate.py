"""Pictures against pixels worked out by hand, and the validation loss against a sum over single images."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from fastmim.data import Batch
from fastmim.evaluate.curve import save_curve
from fastmim.evaluate.reconstruct import draw_grid, save_picture, spread_images
from fastmim.evaluate.validation import MASK_SEED, validation_loss
from fastmim.objectives import create_objective
from fastmim.objectives.masks import pixel_mask
from fastmim.objectives.pictures import GREY, RECONSTRUCTION, Picture

VIT = {"name": "vit", "img_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(**options):
    torch.manual_seed(0)
    encoder = VIT | {"in_chans": options.pop("in_chans", 3)}
    return create_objective("simmim", encoder=encoder, unit=16, **options)


def sample(in_chans=3, count=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, in_chans, 32, 48), dtype=torch.uint8, generator=generator)


def test_pixel_mask_covers_patches_of_a_rectangle():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1, 2] = True
    hidden = pixel_mask(mask, (32, 48))
    assert hidden.shape == (1, 1, 32, 48)
    assert hidden.sum() == 64
    assert hidden[0, 0, 8:16, 16:24].all()


@pytest.mark.parametrize(("norm_target", "loss_on"), [(0, "masked"), (15, "masked"), (0, "all")])
def test_columns(norm_target, loss_on):
    objective = build(norm_target=norm_target, loss_on=loss_on)
    images = sample()
    mask = objective.random_mask(torch.arange(2))
    headings, (truth, masked, prediction, composite) = objective.picture(images, mask)
    assert headings == RECONSTRUCTION == ("image", "masked", "prediction", "composite")
    hidden = pixel_mask(mask, (32, 48)).expand_as(truth)
    torch.testing.assert_close(truth, images.float() / 255, atol=1e-5, rtol=0)
    assert (masked[hidden] == GREY).all()
    assert torch.equal(masked[~hidden], truth[~hidden])
    assert torch.equal(composite[~hidden], truth[~hidden])
    assert torch.equal(composite[hidden], prediction[hidden])
    # What is visible trains nothing unless the loss is on all pixels, where the prediction is shown as it is.
    whole = objective.denormalise(objective.reconstruct_pixels(images, mask))
    expected = whole if loss_on == "all" else torch.where(hidden, whole, torch.tensor(0.5))
    torch.testing.assert_close(prediction, expected, atol=1e-6, rtol=0)
    assert not torch.equal(whole[~hidden], torch.full_like(whole[~hidden], GREY))


@pytest.mark.parametrize("norm_target", [0, 15])
def test_a_perfect_prediction_shows_the_image(norm_target, monkeypatch):
    """Local normalisation is undone: predicting the target itself gives back the image."""
    import fastmim_kernels as fk

    objective = build(norm_target=norm_target)
    images = sample()
    target = objective.normalise(images)
    if norm_target:
        target = fk.local_norm_target(target, norm_target)
    monkeypatch.setattr(objective, "reconstruct", lambda images, mask: target)
    mask = objective.random_mask(torch.arange(2))
    _, (truth, masked, prediction, composite) = objective.picture(images, mask)
    torch.testing.assert_close(composite, truth, atol=1e-3, rtol=0)
    # Each pixel is in one of the two middle columns and grey in the other: together they are the image.
    torch.testing.assert_close(masked + prediction - GREY, truth, atol=1e-3, rtol=0)
    shown = [[(p != GREY).any() for p in image.unfold(1, 8, 8).unfold(2, 8, 8).transpose(0, 2).flatten(0, 1)]
             for image in prediction]  # fmt: skip
    assert torch.equal(torch.tensor(shown), mask.transpose(1, 2).flatten(1))


def test_a_unit_that_does_not_divide_the_image_is_cut():
    """Units of 20 pixels on 32 × 48: those at the far edges are 12 and 8 pixels wide, in every column alike."""
    objective = create_objective("simmim", encoder=VIT | {"patch_size": 4}, unit=20)
    mask = torch.zeros(1, 8, 12, dtype=torch.bool)
    mask[0, 5:, 10:] = True  # the unit at the lower right end
    _, (truth, masked, prediction, composite) = objective.picture(sample(count=1), mask)
    corner = torch.zeros(32, 48, dtype=torch.bool)
    corner[20:, 40:] = True
    assert torch.equal((masked[0] == GREY).all(0), corner) and torch.equal((prediction[0] != GREY).any(0), corner)
    assert torch.equal((composite[0] != truth[0]).any(0), corner)


@pytest.mark.parametrize("alpha", [0, 255, 51])
def test_alpha_lies_over_a_checkerboard(alpha):
    """Pixel by pixel, by the formula of Porter and Duff's "over"."""
    objective = build(in_chans=4, mean=(0.5,), std=(0.5,))
    images = sample(4)
    images[:, 3] = alpha
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[:, 0, 0] = True
    _, (truth, masked, *_) = objective.picture(images, mask)
    for row, column in ((0, 0), (7, 8), (8, 7), (31, 47), (20, 16)):
        board = (1.0, 0.75)[(row // 8 + column // 8) % 2]
        over = images[:, :3, row, column] / 255 * alpha / 255 + board * (1 - alpha / 255)
        torch.testing.assert_close(truth[:, :, row, column], over, atol=1e-5, rtol=0)
    assert (masked[:, :, :8, :8] == GREY).all()
    assert torch.equal(masked[:, :, 8:], truth[:, :, 8:])


def test_grey_images_are_shown_as_grey():
    images = sample(1)
    objective = build(in_chans=1, mean=(0.5,), std=(0.5,))
    _, (truth, *_) = objective.picture(images, objective.random_mask(torch.arange(2)))
    torch.testing.assert_close(truth, (images / 255).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 5])
def test_picture_of_any_channels(in_chans, tmp_path):
    objective = build(in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    path = tmp_path / "a" / "step.png"
    objective.train()
    assert save_picture(objective, sample(in_chans), torch.arange(2), path)
    assert objective.training
    with Image.open(path) as picture:
        # 48 × 32 px become four times as large: 4 columns of 192 and 2 rows of 128, with gaps of 4
        assert picture.size == (4 * 196 + 4, 24 + 2 * 132)
        assert picture.mode == "RGB"
    assert [p.name for p in path.parent.iterdir()] == ["step.png"]


@pytest.mark.parametrize(
    ("size", "cell"),
    [((100, 120), (200, 240)), ((96, 96), (192, 192)), ((192, 192), (192, 192)), ((256, 384), (256, 384)),
     ((384, 32), (1152, 96))],
)  # fmt: skip
def test_grid_places_pixels(size, cell):
    red = torch.zeros(1, 3, *size)
    red[:, 0] = 1
    picture = draw_grid(Picture(["image", "masked"], [red, red * 0]))
    height, width = cell
    assert picture.size == (2 * (width + 4) + 4, 24 + height + 4)
    assert picture.getpixel((4, 24)) == picture.getpixel((3 + width, 23 + height)) == (255, 0, 0)
    assert picture.getpixel((8 + width, 24)) == picture.getpixel((7 + 2 * width, 23 + height)) == (0, 0, 0)
    heading = picture.crop((0, 0, picture.width, 24)).convert("L")
    assert (
        min(heading.get_flattened_data() if hasattr(heading, "get_flattened_data") else heading.getdata())
        < 100
    )


def test_validation_is_the_mean_over_images():
    objective = build(loss="l2")
    objective.encoder.blocks[0].eval()  # a mode of its own, which must survive
    objective.train(True)
    objective.encoder.blocks[0].eval()
    images, ids = sample(count=5), torch.arange(5) + 40
    batches = [(images[:3], ids[:3]), (images[3:], ids[3:])]  # unequal batches: the weights matter
    got = validation_loss(objective, batches)
    assert objective.training
    assert not objective.encoder.blocks[0].training
    objective.eval()
    with torch.no_grad():
        masks = objective.random_mask(ids, seed=MASK_SEED, epoch=0)
        single = [objective(images[i : i + 1], masks[i : i + 1])["loss"].item() for i in range(5)]
    assert got == pytest.approx(sum(single) / 5, rel=1e-5)
    assert validation_loss(objective, batches, max_batches=1) == pytest.approx(sum(single[:3]) / 3, rel=1e-5)
    assert all(param.grad is None for param in objective.parameters())


def test_validation_without_images():
    with pytest.raises(ValueError, match="data.val_path"):
        validation_loss(build(), [])


def test_curve(tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "val_loss": 0.6}]
    path = save_curve(rows, tmp_path / "loss.png")
    with Image.open(path) as picture:
        assert picture.size == (720, 480)
    assert save_curve([], tmp_path / "none.png") is None


def test_missing_matplotlib_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert save_curve([{"step": 1, "loss": 1.0}], tmp_path / "loss.png") is None
    assert "pip install matplotlib" in caplog.text


class OneByOne:
    """A loader of single images in file order; the files named bad give no batch."""

    def __init__(self, num_images, bad=()):
        self.num_images, self.bad = num_images, bad

    def epoch(self, epoch, start=0):
        for i in range(start, self.num_images):
            if i not in self.bad:
                yield Batch(torch.full((1, 3, 4, 4), i, dtype=torch.uint8), torch.tensor([i]))


def test_picture_images_are_spread_over_the_folder():
    images, ids = spread_images(OneByOne(12), 4)
    assert ids.tolist() == [0, 3, 6, 9] and images[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert spread_images(OneByOne(2), 4)[1].tolist() == [0, 1]
    assert spread_images(OneByOne(12, bad=(3, 9, 10, 11)), 4)[1].tolist() == [0, 4, 6]
    assert spread_images(OneByOne(2, bad=(0, 1)), 2) is None
