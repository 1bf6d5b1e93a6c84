"""The study of few labels: its configs are valid, rows are made once, the best rate is taken, its table is the mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import study


@pytest.fixture
def images(tmp_path):
    """Two classes of 12 small pictures in train, and one of each in val."""
    for side, count in (("train", 12), ("val", 1)):
        for name in "01":
            folder = tmp_path / "images" / side / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("start", study.STARTS)
def test_every_start_is_a_config(start):
    steps, own = study.STARTS[start]
    cfg = study.pretraining(own, steps, 2, Path("images"), Path("out"))
    assert (cfg.objective.name, cfg.train.steps, cfg.train.seed) == ({"scratch": "simmim"}.get(start, start), steps, 2)
    assert (cfg.optim.lr == 0) == (start == "scratch") and cfg.model.abs_pos_embed == "sincos"


def test_all_starts_are_tuned_alike():
    tunings = [study.fine_tuning(Path(name), 3e-3, 0, ["data.path=a", "train.steps=5"]) for name in ("one", "other")]
    trees = [cfg.model_dump() for cfg in tunings]
    assert trees[0]["model"].pop("init_from") != trees[1]["model"].pop("init_from")
    assert trees[0] == trees[1] and trees[0]["objective"]["name"] == "classify"


def test_more_labels_hold_the_fewer(images, tmp_path):
    made = study.Study(tmp_path / "s.csv", tmp_path, images)
    few, more, other = (made.listed(*how).read_text().splitlines() for how in ((0, 3), (0, 8), (1, 3)))
    assert set(few) < set(more) and len(few) == 6 and sorted(few) != sorted(other)
    assert all((images / "train" / name).is_file() for name in more)


def test_a_row_is_made_once_and_written_at_once(images, tmp_path):
    out, file, made = tmp_path / "s.csv", tmp_path / "there", []

    def make():
        made.append(1)
        return {"top1": 50.0 + len(made)}

    key = dict(kind="finetune", start="mae", seed=0, labels=10, lr=1e-3)
    study.Study(out, tmp_path, images).row(make, **key)
    again = study.Study(out, tmp_path, images)
    assert again.row(make, **key)["top1"] == "51.0" and len(made) == 1
    assert again.row(make, **key, needs=file)["top1"] == "52.0"
    file.touch()
    again.row(make, **key, needs=file)
    assert len(made) == 2 and [row["top1"] for row in study.read(out)] == ["52.0"]


def test_the_rate_is_the_best_on_held_out_labels(images, tmp_path, monkeypatch):
    made, asked = study.Study(tmp_path / "s.csv", tmp_path, images), []

    def tune(kind, start, seed, labels, lr):
        asked.append((kind, start, seed, labels))
        return {"top1": {1e-3: "50", 3e-3: "60", 6e-3: "60"}[lr]}

    monkeypatch.setattr(made, "fine_tune", tune)
    assert made.rate("mae") == 3e-3 and set(asked) == {("choose", "mae", 0, 20)}


def test_the_table_is_the_mean_and_deviation_over_seeds(tmp_path):
    rows = [dict(kind="finetune", start="mae", labels="5", top1=top1) for top1 in ("80", "84")]
    rows += [dict(kind="finetune", start="mae", labels="20", top1="90")]
    rows += [dict(kind="pretrain", start="mae", cpu_seconds="61"), dict(kind="probe", start="mae", linear=70, knn20=60)]
    rows += [dict(kind="finetune", start="longer", labels="5", top1="40")]
    assert study.table(rows).splitlines()[2:] == [
        "| mae | 61 | 82.0 ± 2.8 | 90.0 | 70.0 | 60.0 |",
        "| longer | – | 40.0 | – | – | – |",
    ]
    study.draw(rows, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
