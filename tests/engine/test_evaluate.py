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


@pytest.mark.parametrize("norm_target", [0, 15])
def test_columns(norm_target):
    objective = build(norm_target=norm_target)
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
    _, (truth, _, prediction, composite) = objective.picture(images, objective.random_mask(torch.arange(2)))
    torch.testing.assert_close(prediction, truth, atol=1e-3, rtol=0)
    torch.testing.assert_close(composite, truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 5])
def test_picture_of_any_channels(in_chans, tmp_path):
    objective = build(in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    path = tmp_path / "a" / "step.png"
    objective.train()
    assert save_picture(objective, sample(in_chans), torch.arange(2), path)
    assert objective.training
    with Image.open(path) as picture:
        # 48 px wide cells are doubled so that headings fit: 4 columns of 96 and 2 rows of 64, with gaps of 4
        assert picture.size == (4 * 100 + 4, 20 + 2 * 68)
        assert picture.mode == "RGB"
    assert [p.name for p in path.parent.iterdir()] == ["step.png"]


def test_grid_places_pixels():
    red = torch.zeros(1, 3, 100, 120)
    red[:, 0] = 1
    picture = draw_grid(Picture(["image", "masked"], [red, red * 0]))
    assert picture.getpixel((4, 20)) == picture.getpixel((123, 119)) == (255, 0, 0)
    assert picture.getpixel((128, 20)) == (0, 0, 0)
    heading = picture.crop((0, 0, picture.width, 20)).convert("L")
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
