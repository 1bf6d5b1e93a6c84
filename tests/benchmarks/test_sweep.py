"""The sweep over masks: every point is a config with its own AvgDist, rows that are there are not run again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from benchmarks import sweep
from fastmim.engine.build import build_objective


@pytest.mark.parametrize("name", sweep.POINTS)
def test_every_point_is_a_config_of_its_masks(name):
    point = sweep.POINTS[name]
    cfg = sweep.config(point, 2, 50, Path("images"), Path("out"))
    assert (cfg.train.seed, cfg.train.steps, cfg.objective.loss_on) == (2, 50, point.loss_on)
    masks = build_objective(cfg).random_mask(torch.arange(3))
    assert torch.equal(masks, point.masks(torch.arange(3))) and masks.any()


def test_the_distance_of_a_point_is_scipys(monkeypatch):
    monkeypatch.setattr(sweep, "MASKS", 20)
    point = sweep.POINTS["block-4-0.6"]
    hidden = point.masks(torch.arange(20)).repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    distances = np.concatenate([distance_transform_edt(one)[one] for one in hidden])
    assert sweep.avg_dist(point) == pytest.approx(distances.mean())


def test_only_what_is_missing_is_run_a_seed_after_the_other():
    there = [dict(point="untrained", seed="0", steps="600"), dict(point="b", seed="1", steps="600")]
    there.append(dict(point="a", seed="0", steps="50"))  # of another length
    wanted = list(sweep.missing(["a", "b"], 2, 600, there))
    assert wanted == [("a", 0), ("b", 0), ("untrained", 1), ("a", 1)]


def rows():
    common = dict(steps="600", knn20="40", rankme="5")
    for seed, linear in enumerate((80, 83)):
        point = dict(point="random-4-0.6", mask="random", unit="4", mask_ratio="0.6", loss_on="masked", avg_dist="2.1")
        yield common | point | dict(seed=seed, linear=linear)
    yield common | dict(point="untrained", mask="", unit="", mask_ratio="", loss_on="", avg_dist="", seed=0, linear=85)


def test_the_table_and_the_picture_are_of_means_over_seeds(tmp_path):
    assert sweep.table(list(rows())).splitlines()[2:] == [
        "| untrained encoder | – | – | 1 | 600 | 85.0 | 40.0 | 5.0 |",
        "| random, 4 px, 0.6 | masked | 2.1 | 2 | 600 | 81.5 ± 2.1 | 40.0 ± 0.0 | 5.0 ± 0.0 |",
    ]
    sweep.draw(list(rows()), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
