"""Fine-tuning runs: labels of files, accuracy, restarts, several ranks, from a pretraining at another window."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmim.cli import main
from fastmim.config import load_config
from fastmim.engine.local import LocalEngine
from fastmim.engine.metrics import read_rows
from fastmim.engine.train import train
from fastmim.models.resample import resample_bias_table

COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 50), "red": (210, 40, 30)}
TASK = {
    "objective__name": "classify",
    "objective__auto_augment": "none",
    "objective__layer_decay": 0.8,
    "optim__weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Class folders of 8 pictures each, in noise of one colour; and one that is no image."""
    folder, generator = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(8):
            pixels = np.clip(np.array(colour) + generator.normal(0, 25, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / "red" / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture
def task(overrides, coloured):
    """Overrides of a fine-tuning run: those of a pretraining, but for what SimMIM alone has."""

    def describe(out, **changes):
        keys = TASK | {"data__path": coloured, "data__num_workers": 0, "train__micro_batch_size": 8} | changes
        return [line for line in overrides(out, **keys) if not line.startswith("objective.unit=")]

    return describe


@pytest.fixture
def run(task):
    return lambda out, **changes: train(load_config(None, task(out, **changes)))


def test_classes_are_learnt_from_the_files_that_were_used(run, coloured, tmp_path):
    """Every second file is bad: a label taken from the sample's own number would be a stand-in's in half of all."""
    for name in COLOURS:
        for i in (1, 3, 5):
            other = tmp_path / "images" / name / f"{i}.png"
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes((coloured / name / f"{i}.png").read_bytes())
            other.with_name(f"{i}x.png").write_bytes(b"broken")
    result = run(
        tmp_path / "run", data__path=tmp_path / "images", data__val_path=coloured, data__max_bad_fraction=0.9,
        train__steps=40, train__val_every=20, optim__lr=2e-2, optim__lr_batch=None, data__verify="none",
    )  # fmt: skip
    assert result.val_top1 == 1.0
    written = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert [row["class"] for row in written["classes"]] == list(COLOURS)
    assert all(row["recall"] == 1 and row["images"] == 8 for row in written["classes"])
    assert (tmp_path / "run" / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    best = load_file(tmp_path / "run" / "best.safetensors")
    assert best["head.weight"].shape == (3, 16)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, tmp_path, monkeypatch):
    changes = {"train__steps": 8, "train__save_every": 4, "data__val_fraction": 0.3}
    run(tmp_path / "whole", **changes)
    step = LocalEngine.step

    def dies(self):
        step(self)
        if self.steps == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", **changes)
    monkeypatch.undo()
    run(tmp_path / "stopped", **changes)
    ours, theirs = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [read_rows(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "stopped")]
    assert rows[0]["val_top1"] == rows[1]["val_top1"] and rows[0]["loss"] == rows[1]["loss"]


def test_two_ranks_are_one(zero_run, launch, coloured, tmp_path):
    """Images are mixed with others of their micro-batch: without that, what is computed is the same."""
    changes = TASK | {"data__path": coloured, "train__steps": 4, "objective__mixup": 0.0, "objective__cutmix": 0.0}

    def lines(ranks, stage):
        keys = zero_run(tmp_path / f"{ranks}-{stage}", ranks, **changes, efficiency__zero_stage=stage)
        return [line for line in keys if not line.startswith("objective.unit=")]

    train(load_config(None, lines(1, None)))
    launch([lines(2, None), lines(2, 2)], 2)
    one, *others = (
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("1-None", "2-None", "2-2")
    )
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


def test_from_a_pretraining_with_another_window(overrides, task, tmp_path, capsys):
    swin = {"model__name": "swin", "model__window_size": 4, "model__img_size": 32}
    train(load_config(None, overrides(tmp_path / "pre", **swin, train__steps=1)))
    config = tmp_path / "fine.yaml"
    config.write_text("objective: {name: classify}\n")
    keys = [line for line in task(tmp_path / "fine", train__steps=1, optim__lr=0.0) if not line.startswith("model.")]
    assert main(["finetune", str(config), "--encoder", str(tmp_path / "pre"), *keys, "model.img_size=48",
                 "model.window_size=6"]) == 0  # fmt: skip
    assert "relative_position_bias_table 4 × 4 to 6 × 6 resampled" in capsys.readouterr().err
    before, after = (load_file(tmp_path / name / "encoder.safetensors") for name in ("pre", "fine"))
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(after[name], resample_bias_table(before[name], (4, 4), (6, 6)))
    assert torch.equal(after["layers.0.blocks.0.mlp.fc1.weight"], before["layers.0.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(objective__num_classes=7), r"objective.num_classes=7: data.path has 3 classes"),
        (dict(data__labels="missing.csv"), r"data.labels=missing.csv: no such file"),
        (dict(objective__auto_augment="nothing-m9"), r"objective.auto_augment=nothing-m9"),
    ],
)
def test_what_cannot_work_is_one_line(run, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        run(tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)


def test_a_class_that_was_not_trained_on(run, coloured, tmp_path):
    (tmp_path / "held" / "violet").mkdir(parents=True)
    (tmp_path / "held" / "violet" / "0.png").write_bytes((coloured / "red" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"data.val_path=.*: 1 class not among those trained on \(violet\)"):
        run(tmp_path / "run", data__val_path=tmp_path / "held")


def test_finetune_wants_a_fine_tuning(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("objective: {name: simmim}\n")
    assert main(["finetune", str(tmp_path / "c.yaml"), "data.path=x"]) == 2
    assert "finetune learns classes; use classify" in capsys.readouterr().err
    assert main(["finetune", str(tmp_path / "c.yaml"), "--encoder", str(tmp_path)]) == 2
    assert "no encoder.safetensors there; fastmim convert" in capsys.readouterr().err
