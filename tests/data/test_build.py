"""Which loader is taken, synthetic images, and what the config says about it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastmim.data import build_loader, choose_loader, dali
from fastmim.data.augment import View
from fastmim.data.synthetic import NUM_IMAGES, SyntheticLoader

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("loader", "device", "in_chans", "train", "installed", "wanted"),
    (
        ("auto", CPU, 3, True, True, "torchvision"),  # faster than DALI there
        ("auto", GPU, 3, True, True, "dali"),
        ("auto", GPU, 1, True, True, "dali"),
        ("auto", GPU, 4, True, True, "torchvision"),  # DALI gives no alpha
        ("auto", GPU, 3, True, False, "torchvision"),
        ("auto", GPU, 3, False, True, "torchvision"),  # a validation loss must not depend on the loader
        ("dali", GPU, 3, False, True, "torchvision"),
        ("dali", CPU, 3, True, True, "dali"),
        ("pil", GPU, 3, True, True, "pil"),
        ("synthetic", CPU, 3, True, False, "synthetic"),
    ),
)
def test_choice(monkeypatch, loader, device, in_chans, train, installed, wanted):
    monkeypatch.setattr(dali, "have_dali", lambda: installed)
    assert choose_loader(loader, device=device, in_chans=in_chans, train=train)[0] == wanted


def test_auto_says_what_it_took(photos, caplog):
    caplog.set_level("INFO", "fastmim")
    with build_loader(path=photos, img_size=(32, 32), micro_batch_size=4, num_workers=0):
        assert "data.loader=auto: torchvision (the fastest on a CPU)" in caplog.text


def test_synthetic_images():
    loader = build_loader(path=None, img_size=(8, 12), micro_batch_size=4, loader="synthetic", seed=3)
    assert isinstance(loader, SyntheticLoader)
    assert loader.num_images == NUM_IMAGES and loader.steps_per_epoch == NUM_IMAGES // 4
    batches = [batch for _, batch in zip(range(5), loader.epoch(1, start=7), strict=False)]
    assert all(batch.images.shape == (4, 3, 8, 12) and batch.images.dtype == torch.uint8 for batch in batches)
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert len(set(ids.tolist())) == 20 and ids.max() < NUM_IMAGES
    again = next(loader.epoch(1, start=8))
    assert torch.equal(again.images, batches[1].images) and torch.equal(again.sample_ids, batches[1].sample_ids)
    with pytest.raises(ValueError, match="start must lie in"):
        loader.epoch(-1)


def test_held_out_images_are_read_where_training_is_synthetic(photos):
    options = dict(img_size=(8, 8), micro_batch_size=4, loader="synthetic", num_workers=0, train=False)
    with build_loader(path=photos, **options) as loader:
        assert loader.num_images == 37


@pytest.mark.parametrize(
    ("view", "message"),
    (
        (View((0, 4)), "model.img_size"),
        (View((4, 4), count=0), "View.count=0"),
        (View((4, 4), scale=(0.5, 0.2)), "data.scale"),
        (View((4, 4), interpolation="nearest"), "data.interpolation"),
    ),
)
def test_wrong_views(photos, view, message):
    with pytest.raises(ValueError, match=message):
        build_loader(path=photos, img_size=(4, 4), micro_batch_size=1, views=[view])
    with pytest.raises(ValueError, match="at least one View"):
        build_loader(path=photos, img_size=(4, 4), micro_batch_size=1, views=[])


def test_several_crops_are_for_training_on_images(photos):
    options = dict(img_size=(8, 8), micro_batch_size=4, num_workers=0, views=[View((8, 8), count=2)])
    with build_loader(path=photos, train=False, **options) as loader:
        assert next(loader.epoch(0)).images.shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match="one crop an image"):
        build_loader(path=None, loader="synthetic", **options)


def test_the_package_works_without_dali():
    code = (
        "import sys; sys.modules['nvidia'] = None; sys.modules['nvidia.dali'] = None\n"
        "import fastmim, fastmim.data.dali as dali; assert not dali.have_dali()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
