"""timm's policies, drawn for each sample."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from fastmim.data import build_loader
from fastmim.data.augment import View
from fastmim.data.rand_augment import rand_augment

POLICY = "rand-m9-mstd0.5-inc1"


def test_pixels_are_timms_and_the_process_draws_on_as_before():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 32), np.uint8))
    how = {"translate_const": int(0.45 * 32), "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    for sample in range(20):
        random.seed(7)
        np.random.seed(7)
        found = rand_augment(image, POLICY, random.Random(sample))
        ahead = random.random(), np.random.rand()
        seed = random.Random(sample).getrandbits(32)
        random.seed(seed)
        np.random.seed(seed)
        wanted = rand_augment_transform(POLICY, how)(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert torch.equal(found, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
        random.seed(7)
        np.random.seed(7)
        assert ahead == (random.random(), np.random.rand())


def test_a_sample_is_changed_alike_by_every_number_of_workers(tmp_path):
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    batches = []
    for policy, workers in ((POLICY, 0), (POLICY, 2), (None, 0)):
        views = [View((32, 32), auto_augment=policy)]
        with build_loader(path=tmp_path, img_size=(32, 32), views=views, micro_batch_size=6, num_workers=workers,
                          verify="none") as loader:  # fmt: skip
            batches.append(next(loader.epoch(3)))
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].files, batches[0].sample_ids % 6)
    assert sum(not torch.equal(a, b) for a, b in zip(batches[0].images, batches[2].images, strict=True)) >= 5


def test_what_timm_does_not_know_is_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    options = dict(path=tmp_path, img_size=(32, 32), micro_batch_size=1, num_workers=0)
    with pytest.raises(ValueError, match=r"objective.auto_augment=flips: no policy"):
        build_loader(**options, views=[View((32, 32), auto_augment="flips")])
    with pytest.raises(ValueError, match=r"3 channels, not of 1"):
        build_loader(**options, in_chans=1, views=[View((32, 32), auto_augment=POLICY)])
