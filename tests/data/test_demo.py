"""The demo photographs: real, deterministic, and held-out regions really held out."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmim.data import build_loader, check_images, make_demo
from fastmim.data.demo import _find_photos, _open_photo

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "not" / "yet"
    make_demo(root)
    return root


def tiles(folder: Path) -> dict[str, list[tuple[Path, int, int]]]:
    """photo -> [(file, left, top)]"""
    found: dict[str, list[tuple[Path, int, int]]] = {}
    for path in sorted(folder.iterdir()):
        photo, left, top = re.fullmatch(r"(.+)_160_(\d+)_(\d+)\.jpg", path.name).groups()
        found.setdefault(photo, []).append((path, int(left), int(top)))
    return found


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.jpg"))
    }


def test_a_few_hundred_jpegs_and_no_network(tmp_path, demo, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise AssertionError("the demo touched the network")

    monkeypatch.setattr(socket, "socket", no_network)
    counts = make_demo(tmp_path)
    assert 300 <= counts.train <= 700 and 50 <= counts.val <= 150
    assert len(list((tmp_path / "train").iterdir())) == counts.train
    assert len(list((tmp_path / "val").iterdir())) == counts.val
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (160, 160)
    assert check_images(tmp_path) == (counts.train + counts.val, {})
    assert digest(tmp_path) == digest(demo)  # deterministic


def test_tiles_are_the_photographs_and_train_and_val_share_no_pixel(demo):
    photos = {Path(path).stem: np.asarray(_open_photo(path, r)).astype(int) for path, r in _find_photos()}
    train, val = tiles(demo / "train"), tiles(demo / "val")
    assert set(train) == set(photos) and len(val) >= 12
    used = {
        split: {name: np.zeros(image.shape[:2], bool) for name, image in photos.items()} for split in "tv"
    }
    for split, groups in (("t", train), ("v", val)):
        for name, group in groups.items():
            for path, left, top in group:
                source = photos[name][top : top + 160, left : left + 160]
                assert source.shape[:2] == (160, 160)
                # JPEG at quality 90 stays near its source (worst: fine grass); another place would not
                assert np.abs(np.asarray(Image.open(path)).astype(int) - source).mean() < 12
                used[split][name][top : top + 160, left : left + 160] = True
    for name in photos:
        assert not (used["t"][name] & used["v"][name]).any()
        assert used["t"][name].mean() + used["v"][name].mean() > 0.99  # nothing of a photograph is wasted


def test_a_finished_folder_is_left_alone_and_a_broken_one_is_mended(tmp_path, demo):
    counts = make_demo(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_demo(tmp_path) == counts
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    victims = sorted((tmp_path / "train").iterdir())
    victims[0].unlink()
    assert make_demo(tmp_path) == counts and digest(tmp_path) == digest(demo)
    (tmp_path / "demo.json").unlink()  # as after a kill half way, which may leave half a file
    victims[1].write_bytes(b"half")
    assert make_demo(tmp_path) == counts and digest(tmp_path) == digest(demo)


def test_refusals_are_one_line(tmp_path, demo, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").touch()
    for kwargs, message in (
        ({"directory": tmp_path}, "already holds train/mine.jpg"),
        ({"directory": demo, "size": 128}, "holds a demo made with"),
        ({"directory": demo, "size": 7}, "size=7"),
        ({"directory": demo, "val_fraction": 0.9}, "val_fraction=0.9"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make_demo(**kwargs)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image scikit-learn"):
        make_demo(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_validation_part(tmp_path):
    counts = make_demo(tmp_path, size=256, val_fraction=0.0)
    assert counts.val == 0 and counts.train == len(list((tmp_path / "train").iterdir()))


def test_demo_through_the_loader(demo):
    with build_loader(path=demo / "train", img_size=(96, 96), micro_batch_size=16, num_workers=0) as loader:
        batch = next(loader.epoch(0))
    assert batch.images.float().std() > 30 and not loader.bad_files
