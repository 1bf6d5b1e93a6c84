"""``fastmim data stats``: what it measures against NumPy, and the config that it writes."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastmim import cli
from fastmim.config import load_config
from fastmim.config.edit import with_values
from fastmim.data.source import open_index
from fastmim.data.statistics import measure

CENTRES = np.array([0, 5, -20, 3e4, 1e6]).reshape(5, 1, 1)


@pytest.fixture
def folder(tmp_path):
    """Images of 5 bands and of several sizes, far from 0 in one band, and without data in places; one file is bad."""
    rng = np.random.default_rng(1)
    images = []
    for i in range(7):
        image = rng.normal(size=(5, 20 + i, 24)) * [[[1]], [[2]], [[3]], [[4]], [[5]]] + CENTRES
        image[1, : 2 * i] = -9999
        images.append(image.astype(np.float32))
        tifffile.imwrite(tmp_path / f"{i}.tif", images[-1], photometric="minisblack")
    (tmp_path / "bad.tif").write_bytes(b"II*\0")
    return tmp_path, images


def test_mean_and_deviation_are_numpys(folder):
    path, images = folder
    samples = np.concatenate([image.reshape(5, -1) for image in images], 1).astype(np.float64)
    samples[samples == -9999] = np.nan
    told = []
    index = open_index(path, pixels="float32")
    found = measure(index, in_chans=5, pixels="float32", no_data=-9999.0, progress=lambda *step: told.append(step))
    assert np.allclose(found.mean, np.nanmean(samples, 1), rtol=1e-12, atol=1e-12)
    assert np.allclose(found.std, np.nanstd(samples, 1), rtol=1e-9)
    assert np.allclose(found.data, (~np.isnan(samples)).mean(1), rtol=1e-12)
    assert found.images == 7 and [path.rpartition("/")[2] for path in found.bad] == ["bad.tif"]
    assert told[-1] == ("statistics", 8, 8) and [step[1] for step in told] == sorted({step[1] for step in told})


def test_of_eight_bits_they_are_of_values_up_to_1(photos):
    index = open_index(photos)
    found = measure(index, in_chans=3)
    samples = np.concatenate([np.asarray(Image.open(index.path(i)).convert("RGB")).reshape(-1, 3) for i in
                              range(len(index))]) / 255.0  # fmt: skip
    assert np.allclose(found.mean, samples.mean(0), atol=2e-3) and np.allclose(found.std, samples.std(0), atol=2e-3)


def test_a_band_without_a_deviation(tmp_path):
    for value, options, reason in ((7, {}, "band 1 of 2 is 7 everywhere"),
                                   (0, {"no_data": 0.0}, "band 1 of 2 is nowhere data")):  # fmt: skip
        image = np.random.default_rng(0).normal(size=(2, 9, 11)).astype(np.float32)
        image[1] = value
        np.save(tmp_path / "a.npy", image)
        with pytest.raises(ValueError, match=f"{reason}, and has no std; leave it out"):
            measure(open_index(tmp_path, pixels="float32"), in_chans=2, pixels="float32", **options)


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_writes_a_config(folder, tmp_path_factory, capsys):
    path, images = folder
    there = tmp_path_factory.mktemp("configs")
    own = there / "own.yaml"
    own.write_text("# mine\nmodel: {in_chans: 5}\ndata:\n  # samples as stored\n  pixels: float32\n  no_data: -9999\n"
                   f"  path: {path}\n  val_fraction: null\n", encoding="utf-8")  # fmt: skip
    status, out, err = run(capsys, "pretrain", own)
    assert status == 2 and "data.mean: not given" in err and "`fastmim data stats CONFIG --write FILE`" in err
    new = there / "new.yaml"
    status, out, err = run(capsys, "data", "stats", own, "data.hflip=0", "--write", new)
    assert status == 0 and "7 images, 1 bad file" in out and "left out" in out and "Traceback" not in err
    assert "samples that are data: 100.0%, " in out
    cfg = load_config(new)
    assert cfg.data.hflip == 0 and cfg.data.no_data == -9999 and len(cfg.data.std) == 5
    assert np.allclose(cfg.data.mean[0], np.concatenate([image[0].ravel() for image in images]).mean(), atol=1e-6)
    status, out, err = run(capsys, "data", "stats", own, "--write", own)
    assert status == 0 and load_config(own).data.mean == cfg.data.mean
    assert own.read_text(encoding="utf-8").startswith("# mine\nmodel: {in_chans: 5}\ndata:\n  # samples as stored\n")
    status, out, err = run(capsys, "data", "stats", own, "model.in_chans=4")
    assert status == 2 and "data.max_bad_fraction=0.5: 8 of 8 files cannot be used" in err and err.count("\n") <= 12


TEXTS = (
    ("", "data: {mean: [1.5], std: [2]}"),
    ("train:\n  steps: 3", "train: {steps: 3}\ndata: {mean: [1.5], std: [2]}"),
    ("data:\n", "data: {mean: [1.5], std: [2]}"),
    ("data:  # images\ntrain: {steps: 3}\n", "data: {mean: [1.5], std: [2]}\ntrain: {steps: 3}"),
    ("data:\n    path: a\n    mean:\n      - 1\n      - 2\n    hflip: 0\n",
     "data: {mean: [1.5], std: [2], path: a, hflip: 0}"),
    ("data:\n  std: [3,\n    4]  # of 2019\n  mean: [1, 2]\n", "data: {mean: [1.5], std: [2]}"),
    ("data: {path: a}\n", "data: {mean: [1.5], std: [2], path: a}"),
    ("data:\n- 1\n", None),
    ("a: &x {path: a}\ndata: *x\n", None),
)  # fmt: skip


@pytest.mark.parametrize("text, wanted", TEXTS)
def test_values_are_put_into_a_text(text, wanted):
    from fastmim.config.yaml_text import parse

    values = {"mean": [1.5], "std": [2]}
    if wanted is None:
        with pytest.raises(ValueError, match="data"):
            with_values(text, "data", values)
        return
    got = with_values(text, "data", values)
    assert parse(got) == parse(wanted)
    assert all(comment in got for comment in ("# images", "# of 2019") if comment in text)
