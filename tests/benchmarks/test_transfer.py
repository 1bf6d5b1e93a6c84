"""The transfer study: its configs are valid, each row is made once, and its table and picture are right."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import command, transfer, transfer_settings
from benchmarks.transfer_settings import ENCODERS, OBJECTIVES, pool_of, takes
from fastmim.engine.distributed import World

PAIRS = [(name, encoder) for name in OBJECTIVES for encoder in ENCODERS if takes(name, encoder)]
WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(("objective", "encoder"), PAIRS)
def test_every_pair_of_the_tables_is_a_config(objective, encoder):
    cfg = transfer_settings.config(objective, encoder, 2, Path("images"), Path("out"), 50)
    trained = "simmim" if objective == "visible" else objective
    assert (cfg.objective.name, cfg.model.name, cfg.train.seed) == (trained, encoder, 2)
    assert cfg.train.steps == 50 and cfg.optim.warmup_steps == 5


def test_the_first_weights_are_those_of_every_objective(tmp_path):
    """But of BEiT, whose tokenizer would have to be trained; a mask token is no feature."""
    for encoder in ENCODERS:
        first = {}
        for name in (name for name in OBJECTIVES if takes(name, encoder) and name != "beit"):
            cfg = transfer_settings.config(name, encoder, 3, tmp_path, tmp_path / "out", 1)
            transfer_settings.first_weights(cfg)
            own = transfer.untrained(cfg, WORLD).encoder
            for key, value in own.named_parameters():
                assert key == "mask_token" or first.setdefault(key, value).equal(value), (name, key)
    weight = first["layers.0.blocks.0.attn.qkv.weight"]  # (3 · 24, 24), uniform within √(6 / (72 + 24)) = 0.25
    assert 0.24 < weight.abs().max() <= 0.25 and weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)


def test_only_what_is_missing_is_run_a_seed_after_the_other():
    args = Namespace(objectives=["dino", "mae", "visible"], encoders=["vit"], seeds=2)
    there = [dict(objective="untrained", encoder="vit", pool="cls", seed="0")]
    there.append(dict(objective="mae", encoder="vit", pool=pool_of("mae", "vit"), seed="1"))
    assert [key[::3] for key in transfer.missing(args, there)] == [
        ("untrained", 0), ("dino", 0), ("mae", 0), ("untrained", 1), ("untrained", 1), ("dino", 1)
    ]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """Noise, 8 of each of 10 classes to learn from and 2 to try it on."""
    random = np.random.default_rng(0)
    for number in range(100):
        path = tmp_path / "images" / ("val" if number < 20 else "train") / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_rows_are_made_once_and_those_of_another_length_are_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "cost_of_a_step", lambda *_: 0.25)
    given = f"--data {images} --out {tmp_path / 'out.csv'} --runs {tmp_path / 'runs'} --seeds 1".split()
    given += ["--objectives", "simmim", "--encoders", "swin"]
    assert transfer.main([*given, "--steps", "2"]) == 0
    first = command.read_csv(tmp_path / "out.csv")
    assert [(row["objective"], row["steps"]) for row in first] == [("untrained", ""), ("simmim", "2")]
    assert {(row["train_images"], row["test_images"], row["pool"]) for row in first} == {("80", "20", "mean")}
    transfer.main([*given, "--steps", "2"])
    assert command.read_csv(tmp_path / "out.csv") == first
    with pytest.raises(ValueError, match=r"length '2 steps', and these would be of '3 steps'; give another --out"):
        transfer.main([*given, "--steps", "3"])


def test_the_table_is_the_mean_and_deviation_over_seeds():
    common = dict(encoder="vit", pool="cls", rankme=5, linear=90, steps=7)
    rows = [dict(common, objective="ibot", knn20=k, seed=s, cpu_seconds=3 + s) for s, k in enumerate((50, 53))]
    first = dict(common, objective="untrained", steps="", cpu_seconds="")
    rows += [dict(first, knn20="40.0", seed="0"), dict(first, knn20="42.0", seed="1")]
    assert transfer.table(rows).splitlines()[2:] == [
        "| vit | ibot | cls | 2 | 7 | 4 | 51.5 ± 2.1 | 10.5 ± 0.7 | 90.0 ± 0.0 | 5.0 ± 0.0 |",
        "| vit | untrained | cls | 2 | – | – | 41.0 ± 1.4 | – | 90.0 ± 0.0 | 5.0 ± 0.0 |",
    ]


def test_the_picture_is_of_the_runs_that_are_there(tmp_path):
    transfer.draw(tmp_path, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    pictures = transfer.run_folder(tmp_path, "dino", "swin", 0) / "reconstructions"
    pictures.mkdir(parents=True)
    Image.new("RGB", (60, 120)).save(pictures / "step-00000050.png")
    curves = dict(loss=3.0, teacher_entropy=2.0, mean_entropy=2.5, agreement=0.5)
    rows = [json.dumps(dict(curves, step=25)), json.dumps(dict(curves, step=50)), '{"step": 50, "val_loss": 1}']
    (pictures.parent / "metrics.jsonl").write_text("\n".join(rows))
    transfer.draw(tmp_path, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
