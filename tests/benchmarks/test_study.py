"""The study of few labels: its configs are valid, rows are made once, settings are chosen on the other fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import study


@pytest.fixture
def images(tmp_path):
    """Two classes of 12 small pictures."""
    for name in "01":
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("start", study.STARTS)
def test_every_start_is_a_config(start):
    steps, own = study.STARTS[start]
    cfg = study.pretraining(own, steps, 2, Path("images"), Path("out"))
    assert (cfg.objective.name, cfg.train.steps, cfg.train.seed) == ({"scratch": "simmim"}.get(start, start), steps, 2)
    assert (cfg.optim.lr == 0) == (start == "scratch") and cfg.model.abs_pos_embed == "sincos"


def test_all_starts_are_tuned_alike():
    tunings = [study.fine_tuning(Path(name), 0, ["data.path=a", "train.steps=5"]) for name in ("one", "other")]
    trees = [cfg.model_dump() for cfg in tunings]
    assert trees[0]["model"].pop("init_from") != trees[1]["model"].pop("init_from")
    assert trees[0] == trees[1] and trees[0]["objective"]["name"] == "classify"


def test_more_labels_hold_the_fewer(images, tmp_path):
    how = ((0, 3), (0, 8), (1, 3))
    few, more, other = (study.listed(images, *one, tmp_path / "list").read_text().splitlines() for one in how)
    assert set(few) < set(more) and len(few) == 6 and sorted(few) != sorted(other)
    assert all((images / name).is_file() for name in more)


def test_a_row_is_made_once_and_written_at_once(tmp_path):
    out, file, made = tmp_path / "s.csv", tmp_path / "there", []

    def make():
        made.append(1)
        return {"top1": 50.0 + len(made)}

    key = dict(kind="finetune", fold=1, times=1, start="mae", seed=0, labels=10, lr=1e-3, layer_decay=1.0)
    study.Study(out, tmp_path).row(make, **key)
    again = study.Study(out, tmp_path)
    assert again.row(make, **key)["top1"] == "51.0" and len(made) == 1
    assert again.row(make, **key, needs=file)["top1"] == "52.0"
    file.touch()
    again.row(make, **key, needs=file)
    assert len(made) == 2 and [row["top1"] for row in study.read(out)] == ["52.0"]


def test_settings_are_chosen_on_one_fold_and_tried_on_the_other(tmp_path, monkeypatch):
    made, asked = study.Study(tmp_path / "s.csv", tmp_path), []

    def tune(fold, start, seed, labels, lr, decay):
        asked.append((fold, start, seed, labels, (lr, decay)))
        return {"top1": "60" if (lr, decay) in study.GRID[1:] else "9"}

    monkeypatch.setattr(made, "fine_tune", tune)
    monkeypatch.setattr(made, "probe", lambda fold, start, seed: None)
    made.run(2, ["scratch", "mae"], [5, 20], 2)
    tried = [one for one in asked if one[0] != study.CHOICE]
    assert {one[2] for one in asked if one[0] == study.CHOICE} == {0} and {one[0] for one in tried} == {2}
    assert {one[4] for one in tried} == {study.GRID[1]} and asked.index(tried[0]) == len(asked) - len(tried)
    assert len(set(tried)) == len(tried) == 2 * 3 * 2


def test_the_table_is_the_mean_and_deviation_over_seeds(tmp_path):
    common = dict(start="mae", fold="1", times="1", labels="", top1="", cpu_seconds="")
    tuned = common | dict(kind="finetune", labels="5", cpu_seconds="20")
    rows = [tuned | dict(top1=top1) for top1 in ("80", "84")]
    rows += [tuned | dict(labels="20", top1="90", cpu_seconds="23")]
    rows += [common | dict(kind="pretrain", cpu_seconds="61"), common | dict(kind="probe", linear="70", knn20="60")]
    rows += [
        common | dict(kind="pretrain", fold="0", cpu_seconds="1"),
        tuned | dict(kind="choose", fold="0", top1="99"),
    ]
    rows += [tuned | dict(start="longer", top1="40", cpu_seconds="99"), tuned | dict(fold="2", times="3", top1="93")]
    assert study.table(rows).splitlines()[2:] == [
        "| mae | 61 | 21 | 82.0 ± 2.8 | 90.0 | 70.0 | 60.0 | 1 |",
        "| longer | – | 99 | 40.0 | – | – | – | 1 |",
        "| mae | – | 20 | 93.0 | – | – | – | 2 |",
    ]
    study.draw(rows, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
