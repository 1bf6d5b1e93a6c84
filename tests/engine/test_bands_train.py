"""A folder of 13-band TIFFs with pixels without data: trained, resumed, drawn, looked at, fine-tuned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmim.cli import main
from fastmim.config import load_config
from fastmim.engine.metrics import read_rows
from fastmim.engine.probe import load_encoder
from fastmim.engine.saved import load_objective
from fastmim.engine.train import train
from tests.engine.restarts import check_same, cut, told

BANDS = 13
MEAN, STD = [1000 + 100 * band for band in range(BANDS)], [300]
IMAGES = ["data.pixels=float32", "data.no_data=0", f"data.mean={MEAN}", f"data.std={STD}", "data.num_workers=0"]
SWIN = [
    "model.name=swinv2", "model.img_size=32", f"model.in_chans={BANDS}", "model.embed_dim=8", "model.depths=[1, 1]",
    "model.num_heads=[1, 2]", "model.window_size=4", "model.drop_path_rate=0",
]  # fmt: skip
KEYS = [
    *SWIN, *IMAGES, "objective.unit=8", "objective.norm_target=5", "optim.lr=1e-3", "optim.lr_batch=null",
    "train.steps=4", "train.micro_batch_size=4", "train.log_every=1", "train.save_every=2", "train.keep=5",
    "output.pictures=2", "output.bands=[4, 3, 2]", "output.loggers=[]", "efficiency.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Class folders of 12 smooth 13-band tiles, each with a strip and a band without data."""
    folder = tmp_path_factory.mktemp("tiles")
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:40, :44] / 40
    for number in range(12):
        slopes = generator.uniform(-400, 400, (2, BANDS, 1, 1))
        tile = np.array(MEAN)[:, None, None] + slopes[0] * y + slopes[1] * x + generator.normal(0, 30, (BANDS, 40, 44))
        tile[:, 5 + number : 12 + number, :] = 0
        tile[4 + number % 9] = 0
        path = folder / "ab"[number % 2] / f"{number:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, tile.round().astype(np.uint16), planarconfig="separate", photometric="minisblack")
    return folder


def run(tiles, folder, *keys):
    return train(load_config(None, [*KEYS, f"data.path={tiles}", f"output.dir={folder}", *keys]))


@pytest.fixture(scope="module")
def whole(tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bands") / "run"
    return folder, run(tiles, folder)


def test_a_restart_is_exact_and_a_picture_shows_where_there_is_no_data(whole, tiles, tmp_path):
    folder, result = whole
    losses = [row["loss"] for row in told(folder)]
    assert not result.bad_files and np.isfinite(losses).all()
    pixels = np.asarray(Image.open(result.picture_path))
    magenta = (pixels == (255, 0, 255)).all(-1).mean()
    assert 0.02 < magenta < 0.3
    cut(folder, tmp_path / "run", 4)
    run(tiles, tmp_path / "run")
    check_same(tmp_path / "run", folder, 4)


def test_files_say_how_the_samples_were_read(whole):
    folder, result = whole
    objective, _ = load_objective(folder)
    encoder = load_encoder(result.encoder_path)
    for one in (objective, encoder):
        assert (one.pixels, one.has_gaps, one.in_chans) == ("float32", True, BANDS)
        assert one.mean.flatten().tolist() == MEAN and one.std.flatten().tolist() == STD * BANDS
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == (MEAN, STD * BANDS) and "not of values in [0, 1]" in config["notes"][-1]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, BANDS, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder.encoder.eval()(images)
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-5)


def test_commands_read_as_the_run_did(whole, tiles, tmp_path, capsys):
    folder, _ = whole
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(folder), str(tiles), "--out", str(out), "--most", "2", "--bands", "13"]) == 0
    assert np.asarray(Image.open(out)).std() > 0
    assert main(["reconstruct", str(folder), str(tiles), "--out", str(out), "--bands", "14"]) == 2
    assert "--bands=[14]: the 13 channels are numbered from 1 to 13" in capsys.readouterr().err
    features = tmp_path / "features.safetensors"
    assert main(["features", str(folder), str(tiles), "--out", str(features), "data.num_workers=0"]) == 0
    rows = load_file(features)["pooled"]
    assert rows.shape == (12, 16) and rows.isfinite().all() and rows.std(0).min() > 0
    probe = ["probe", str(folder), str(tiles), "--protocol", "none", "--val", str(tiles), "data.num_workers=0"]
    assert main(probe) == 0 and "12 images to learn from" in capsys.readouterr().out
    (tmp_path / "masks.yaml").write_text("")
    assert main(["masks", str(tmp_path / "masks.yaml"), *KEYS, f"data.path={tiles}", "--out", str(out)]) == 0


def test_fine_tuning_takes_the_reading_from_the_encoder(whole, tiles, tmp_path):
    (tmp_path / "tune.yaml").write_text("objective: {name: classify, auto_augment: none}")
    keys = ["train.steps=1", "train.micro_batch_size=4", "data.num_workers=0", "output.loggers=[]", "optim.lr=1e-4"]
    argv = ["finetune", str(tmp_path / "tune.yaml"), "--encoder", str(whole[0]), f"data.path={tiles}"]
    assert main([*argv, f"data.val_path={tiles}", f"output.dir={tmp_path / 'tuned'}", *keys]) == 0
    assert np.isfinite(read_rows(tmp_path / "tuned" / "metrics.jsonl")[-1]["val_loss"])
