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
from fastmim.data import source
from fastmim.data.held_out import split
from fastmim.data.labels import read_labels
from fastmim.data.scan import scan_folder
from fastmim.engine.labels import part_of
from fastmim.engine.local import LocalEngine
from fastmim.engine.metrics import read_rows
from fastmim.engine.train import train
from fastmim.models.resample import resample_bias_table

COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 50), "red": (210, 40, 30)}
TASK = {
    "objective__name": "classify",
    "objective__auto_augment": "none",
    "objective__layer_decay": 0.8,
    "objective__ema_decay": 0.9,
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
    assert written["ema"]["scores"]["val_top1"] == result.ema_score == 1.0
    best, average = (load_file(tmp_path / "run" / f"best{name}.safetensors") for name in ("", "_ema"))
    assert best["head.weight"].shape == (3, 16) and best.keys() == average.keys()
    assert not torch.equal(best["head.weight"], average["head.weight"])
    end = load_file(tmp_path / "run" / "encoder_ema.safetensors")
    assert {f"encoder.{name}" for name in end} | {"head.weight", "head.bias"} == average.keys()
    checkpoint, out = tmp_path / "run" / "checkpoints", tmp_path / "converted.safetensors"
    assert main(["convert", str(checkpoint), str(out), "--average"]) == 0
    assert all(torch.equal(tensor, end[name]) for name, tensor in load_file(out).items())


def test_several_classes_an_image(run, coloured, tmp_path, monkeypatch):
    """Learnt from a table, beside a table of other images; folders are listed once."""
    table, others = tmp_path / "labels.csv", tmp_path / "others.csv"
    pairs = {"blue": "blue;cold", "green": "cold", "red": ""}
    lines = [f"{name}/{i}.png,{classes}\n" for name, classes in pairs.items() for i in range(8)]
    table.write_text("file,classes\n" + "".join(lines) + "red/broken.png,\n")
    others.write_text("".join(lines[::2]) + "".join(lines[1::2]) + "red/broken.png,blue\n")
    listed = []
    monkeypatch.setattr(source, "scan_folder", lambda root, *how: listed.append(root) or scan_folder(root, *how))
    result = run(
        tmp_path / "run", objective__multi_label="true", data__labels=table, data__val_path=coloured,
        data__val_labels=others, train__steps=40, optim__lr=2e-2, optim__lr_batch=None, data__verify="none",
        objective__smoothing=0.0,
    )  # fmt: skip
    assert len(listed) == 2 and result.val_map == result.ema_score == 1.0 and result.val_top1 is None
    written = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert [(row["class"], row["images"]) for row in written["classes"]] == [("blue", 8), ("cold", 16)]
    assert max(row["f1"] for row in written["thresholds"]) == 1.0
    assert (tmp_path / "run" / "best_ema.safetensors").is_file()


def test_labels_of_a_part_are_those_of_its_files(coloured, tmp_path):
    """Of one folder and of several, one of which may have nothing that is held out."""
    (tmp_path / "one" / "red").mkdir(parents=True)
    (tmp_path / "one" / "red" / "0.png").write_bytes((coloured / "red" / "0.png").read_bytes())
    for paths in ([coloured], [tmp_path / "one", coloured]):
        whole = source.open_index(paths)
        numbers = read_labels(whole).numbers
        assert np.array_equal(part_of(numbers, whole, whole), numbers)
        sides = [split(whole, 0.4, held_out=held_out) for held_out in (False, True)]
        for side in sides:
            own = [{"blue": 0, "green": 1, "red": 2}[side.name(i).decode().split("/")[0]] for i in range(len(side))]
            assert part_of(numbers, whole, side).tolist() == own
        assert sum(map(len, sides)) == len(whole)
        assert part_of(numbers, whole, source.open_index(coloured)) is None


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
    for file in ("encoder.safetensors", "encoder_ema.safetensors"):
        ours, theirs = (load_file(tmp_path / name / file) for name in ("whole", "stopped"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [read_rows(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "stopped")]
    for key in ("val_top1", "ema_val_loss", "loss"):
        assert rows[0][key] == rows[1][key]


def test_two_ranks_are_one(zero_run, launch, coloured, tmp_path):
    """Images are mixed with others of their micro-batch: without that, what is computed is the same."""
    changes = TASK | {"data__path": coloured, "train__steps": 4, "objective__mixup": 0.0, "objective__cutmix": 0.0}
    (tmp_path / "labels.csv").write_text(
        "".join(f"{path.relative_to(coloured)},{path.parent.name};{'ab'[i % 2]}\n"
                for i, path in enumerate(sorted(coloured.rglob("*.png"))))
    )  # fmt: skip
    changes |= {"objective__multi_label": "true", "data__labels": tmp_path / "labels.csv", "data__val_fraction": 0.4}

    def lines(ranks, stage):
        keys = zero_run(tmp_path / f"{ranks}-{stage}", ranks, **changes, efficiency__zero_stage=stage)
        return [line for line in keys if not line.startswith("objective.unit=")]

    train(load_config(None, lines(1, None)))
    launch([lines(2, None), lines(2, 2)], 2)
    for key in ("loss", "val_loss", "ema_val_loss", "val_map"):
        one, *others = (
            [row[key] for row in read_rows(tmp_path / name / "metrics.jsonl") if key in row]
            for name in ("1-None", "2-None", "2-2")
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
        (dict(objective__multi_label="true"), r"data.labels=null: objective.multi_label=true needs a CSV"),
        (dict(data__val_labels="x.csv"), r"data.val_labels=x.csv: names the classes of data.val_path"),
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
    assert "no encoder.safetensors there; `fastmim convert" in capsys.readouterr().err
