"""Classes of images from folders, tables and shards, what is held out, and the crop that probes see."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, InterpolationMode, Resize

from fastmim.data.held_out import places
from fastmim.data.labelled import LabelledImages
from fastmim.data.labels import UNLABELLED, hold_out, read_labels
from fastmim.data.source import open_index


def png(value: int = 0, size: tuple[int, int] = (9, 12)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def folder(root, classes: dict[str | bytes, int]) -> str:
    """So many images in each class folder, the number of the class their grey."""
    for number, (name, count) in enumerate(classes.items()):
        inside = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else os.fsencode(name))
        os.makedirs(inside, exist_ok=True)
        for i in range(count):
            with open(os.path.join(inside, f"{i}.png".encode()), "wb") as file:
                file.write(png(10 * number))
    return os.fspath(root)


def named(index, labels):
    """Class by the name of each image."""
    return {os.fsdecode(index.name(i)): n if n < 0 else labels.classes[n] for i, n in enumerate(labels.numbers)}


def test_folders_of_any_name_are_classes(tmp_path):
    """Spaces, quotes, a line break, another script, bytes that are no UTF-8, nested folders; numbers in their order."""
    odd = ["a b", "it's \"x\"", "line\nbreak", "кот", b"\xff\xfe", "10", "9", "deep/er"]
    index = open_index(folder(tmp_path, dict.fromkeys(odd, 1)))
    labels = read_labels(index)
    assert labels.classes == ("9", "10", "a b", "deep", "it's \"x\"", "line\nbreak", "кот", "\\xff\\xfe")
    assert named(index, labels)["deep/er/0.png"] == "deep" and named(index, labels)["9/0.png"] == "9"
    assert sorted(labels.numbers) == list(range(8))


def test_several_folders_share_their_classes(tmp_path):
    train, val = folder(tmp_path / "train", {"b": 2, "a": 1}), folder(tmp_path / "val", {"b": 1})
    labels = read_labels(open_index([train, val]))
    assert labels.classes == ("a", "b") and labels.numbers.tolist() == [0, 1, 1, 1]


def test_a_table_says_the_class(tmp_path, caplog):
    root = folder(tmp_path / "x", {"in": 3})
    table = tmp_path / "classes.csv"
    table.write_text('﻿file,class\nin/0.png,"cat, big"\n./in/1.png,dog\n', encoding="utf-8")
    index = open_index(root)
    labels = read_labels(index, table)
    assert named(index, labels) == {"in/0.png": "cat, big", "in/1.png": "dog", "in/2.png": UNLABELLED}
    assert "1 image without a class left out" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("in/0.png,cat\nin/9.png,dog\n", "1 file not among the images (line 2: in/9.png)"),
        ("in/0.png\n", "line 1: must be file,class, got in/0.png"),
        ("in/0.png,cat\nin/0.png,dog\n", "line 2: in/0.png has another class above"),
        ("", "is empty"),
        ("in/0.png,cat\n", "one class alone (cat)"),
        (None, "no such file"),
    ],
)
def test_a_wrong_table_is_one_line(text, words, tmp_path):
    index = open_index(folder(tmp_path / "x", {"in": 2}))
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        read_labels(index, tmp_path / "t.csv", "DIR")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_table_says_several_classes(tmp_path):
    """Of an image that has none of them too; one that is not named has no answer, and is counted."""
    index = open_index(folder(tmp_path / "x", {"in": 4}))
    table = tmp_path / "classes.csv"
    table.write_text("file,classes\nin/0.png,cat; dog\nin/2.png,\nin/1.png,10;9;cat\n")
    labels = read_labels(index, table, several=True)
    assert labels.classes == ("9", "10", "cat", "dog") and labels.lacking == 1
    assert labels.numbers.tolist() == [[0, 0, 1, 1], [1, 1, 1, 0], [0] * 4, [UNLABELLED] * 4]
    table.write_text("in/0.png,dog\nin/1.png,dog;cat\n")
    of_others = read_labels(index, table, classes=("bird", "cat", "dog"), several=True)
    assert of_others.numbers[:2].tolist() == [[0, 0, 1], [0, 1, 1]]
    with pytest.raises(ValueError, match=r"1 class not among those trained on \(cat\)"):
        read_labels(index, table, classes=("bird", "dog"), several=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("in/1.png,cat;;dog", "line 2: must be file,class;class, got in/1.png,cat;;dog"),
        ("in/1.png,cat,dog", "line 2: must be file,class;class"),
        ("in/1.png,dog; dog", "line 2: names a class twice: dog; dog"),
        ("in/0.png,dog", "line 2: in/0.png has other classes above (line 1)"),
        ("in/7.png,dog", "1 file not among the images (line 2: in/7.png)"),
    ],
)
def test_a_wrong_line_of_several_classes_is_named(line, words, tmp_path):
    index = open_index(folder(tmp_path / "x", {"in": 2}))
    (tmp_path / "t.csv").write_text(f"in/0.png,cat;dog\n{line}\n")
    with pytest.raises(ValueError) as error:
        read_labels(index, tmp_path / "t.csv", "DIR", several=True)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_images_beside_the_class_folders_are_refused(tmp_path):
    root = folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "loose.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"1 image in no class folder \(loose.png\); put"):
        read_labels(open_index(root), field="DIR")


def test_members_of_shards_say_the_class(tmp_path):
    """A sample without ``.cls`` has none; the key counts, not the order of the members."""
    members = {"x/0.cls": b"7\n", "x/0.png": png(), "x/1.png": png(), "x/1.cls": b"11", "x/2.png": png()}
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    index = open_index(tmp_path)
    labels = read_labels(index)
    assert labels.classes == ("7", "11") and labels.numbers.tolist() == [0, 1, -1] * 2


def test_a_fifth_of_each_class_is_held_out():
    numbers = np.array([0] * 10 + [1] * 2 + [2] + [-1] * 5)
    random = np.random.default_rng(0).random(len(numbers))
    out = hold_out(numbers, random, 0.2)
    assert [int(out[numbers == c].sum()) for c in (0, 1, 2, -1)] == [2, 1, 0, 0]
    assert set(np.flatnonzero(out[:10])) == set(np.argsort(random[:10])[:2])


def test_what_is_held_out_and_what_is_used(tmp_path, caplog):
    root = folder(tmp_path / "x", {"a": 10, "b": 10})
    images = LabelledImages(root)
    assert images.held_out.sum() == 4 and images.labels.tolist() == [0] * 10 + [1] * 10
    index = open_index(root)
    assert images.held_out[:10].nonzero().flatten().tolist() == sorted(places(index)[:10].argsort()[:2])
    few = LabelledImages(root, most=5)
    assert few.labels.tolist() == [0, 0, 0, 1, 1]
    other = LabelledImages(root, folder(tmp_path / "y", {"a": 1, "new": 2}))
    assert other.held_out.tolist() == [False] * 20 + [True] * 3
    assert "2 images of 1 class without a training image count as wrong" in caplog.text
    folder(tmp_path / "both", {"train/a": 1, "train/b": 1, "val/b": 1})
    assert LabelledImages(tmp_path / "both").held_out.tolist() == [False, False, True]


def test_one_image_a_class_needs_others_to_try_it_on(tmp_path):
    root = folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"DIR=.*: no class has two images"):
        LabelledImages(root)
    assert LabelledImages(root, root).held_out.tolist() == [False, False, True, True]


def test_batches_are_the_images_in_their_order_cut_as_torchvision_cuts_them(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (40, 50 + 7 * i, 3), dtype=np.uint8) for i in range(4)]
    for i, picture in enumerate(pictures):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"{i % 2}" / f"{i}.png")
    images = LabelledImages(tmp_path)
    with images.loader((28, 28), micro_batch_size=3, num_workers=0) as loader:
        batches = list(loader.epoch(0))
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == [0, 1, 2, 3]
    cut = [Resize(32, InterpolationMode.BICUBIC, antialias=True), CenterCrop(28)]
    for found, i in zip(torch.cat([batch.images for batch in batches]), (0, 2, 1, 3), strict=True):
        wanted = torch.from_numpy(pictures[i]).permute(2, 0, 1)
        for step in cut:
            wanted = step(wanted)
        assert torch.equal(found, wanted)
    with images.loader((28, 28), augmented=True, micro_batch_size=2, num_workers=0) as loader:
        ids = torch.cat([batch.sample_ids for batch in loader.epoch(0)])
    assert sorted(ids.tolist()) == [0, 1]  # of those to learn from alone
