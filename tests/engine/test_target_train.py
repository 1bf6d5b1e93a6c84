"""A whole run of SimMIM on clusters of colours, from the images on: their file, a picture, a restart, mistakes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

from fastmim.cli import main
from fastmim.config import load_config
from fastmim.engine.train import train
from fastmim.evaluate.clusters import fit_clusters
from tests.engine.restarts import check_same, cut, told

COLOURS = np.array([[200, 40, 40], [20, 60, 220], [240, 240, 230], [10, 10, 10], [40, 200, 90]], np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Eight pictures of squares of five colours, and clusters of these."""
    folder = tmp_path_factory.mktemp("clusters")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        ids = generator.integers(0, 5, (4, 4)).repeat(16, 0).repeat(16, 1)
        Image.fromarray(COLOURS[ids]).save(folder / "images" / f"{i}.png")
    how = [str(folder / "images"), "--out", str(folder / "colours.safetensors"), "--clusters", "5"]
    assert main(["data", "clusters", *how, "model.name=swin_tiny", "model.img_size=64"]) == 0
    return folder


def config(home, folder, *more):
    keys = [
        "model.name=swinv2", "model.img_size=32", "model.embed_dim=8", "model.depths=[1, 1]", "model.num_heads=[1, 2]",
        "model.window_size=4", "objective.unit=8", "objective.target=clusters", "objective.target_stride=2",
        f"objective.clusters={home / 'colours.safetensors'}", "objective.head=mlp", f"data.path={home / 'images'}",
        "data.num_workers=0", "optim.lr=1e-2", "optim.lr_batch=null", "optim.warmup_steps=1", "train.steps=8",
        "train.micro_batch_size=4", "train.log_every=1", "train.save_every=4", "train.keep=5", "output.pictures=2",
        "output.loggers=[]", "efficiency.threads=1", f"output.dir={folder}", *more,
    ]  # fmt: skip
    return load_config(None, keys)


@pytest.fixture(scope="module")
def whole(home):
    return home / "run", train(config(home, home / "run"))


def test_the_clusters_are_the_colours(home):
    """Crops are resized, so that a few pixels lie between two squares."""
    with safe_open(home / "colours.safetensors", "np") as file:
        centres, facts = file.get_tensor("centres"), {key: json.loads(value) for key, value in file.metadata().items()}
    assert centres.dtype == np.float32 and (np.diff(centres.mean(1)) >= 0).all()
    distance = np.abs(centres[:, None] * 255 - COLOURS).max(-1)
    assert sorted(distance.argmin(1)) == [0, 1, 2, 3, 4] and distance.min(1).max() < 12
    assert facts["images"] == 8 and facts["pixels"] == 8 * 4096 and facts["in_chans"] == 3


def test_a_run_learns_them_and_draws_a_picture(whole):
    folder, result = whole
    losses = [row["loss"] for row in told(folder)]
    assert abs(losses[0] - np.log(5)) < 0.5 and losses[-1] < losses[0]
    assert result.picture_path is not None and result.picture_path.is_file()


def test_a_restart_is_exact_and_other_colours_are_refused(whole, home, tmp_path):
    cut(whole[0], tmp_path / "run", 8)
    train(config(home, tmp_path / "run"))
    check_same(tmp_path / "run", whole[0], 8)
    found = load_file(tmp_path / "run/checkpoints/step-00000008/model.safetensors")
    assert not any("target" in name for name in found), "the colours stay in their file"
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    other = tmp_path / "other.safetensors"
    save_file({"centres": np.random.default_rng(1).random((5, 3), dtype=np.float32)}, other)
    with pytest.raises(ValueError, match="objective.clusters"):
        train(config(home, tmp_path / "run", f"objective.clusters={other}"))


def test_mistakes_are_one_line(home, capsys):
    images, out = str(home / "images"), str(home / "x.safetensors")
    for argv, message in [
        ([images, "--out", str(home / "no/x.safetensors")], "there is no folder"),
        ([images, "--out", out, "--clusters", "1"], "--clusters 1: must be at least 2"),
        ([str(home / "nowhere"), "--out", out], "no such folder"),
    ]:
        assert main(["data", "clusters", *argv]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--clusters 30: these images have 4 pixels; use fewer"):
        fit_clusters([type("Batch", (), {"images": torch.zeros(1, 20, 2, 2, dtype=torch.uint8)})], 30)


def test_any_number_of_channels(home):
    """Two colours of twenty bands, apart in one of them."""
    images = torch.full((3, 20, 8, 8), 50, dtype=torch.uint8)
    images[:, 17, :4] = 250
    report = fit_clusters([type("Batch", (), {"images": one[None]}) for one in images], 2)
    assert report.images == 3 and report.pixels == 192 and report.used == 2 and report.error < 1e-4
    assert np.allclose(report.centres[:, 17] * 255, [50, 250]) and np.allclose(report.centres[:, 3] * 255, 50)
