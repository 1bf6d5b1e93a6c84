"""A checkpoint that something has damaged is named, by ``train.resume`` and by ``convert``, and the whole one before it
is offered or taken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmim.cli import main
from fastmim.engine.checkpoint import check_whole, convert
from fastmim.engine.checkpoint.whole import whole_checkpoint

STATE, RNG, MODEL, OPTIMIZER = "state.json", "rng.safetensors", "model.safetensors", "optimizer.safetensors"
SHARD0, SHARD1, SHARD2 = (f"shard-0000{rank}.safetensors" for rank in range(3))
STORED = Path(__file__).with_name("old_checkpoints")


def copies(kind, root):
    """Two checkpoints of a run as an earlier version wrote them: the steps 1 and 2."""
    for step in (1, 2):
        folder = root / f"step-{step:08d}"
        shutil.copytree(STORED / kind / "checkpoints/step-00000002", folder)
        state = json.loads((folder / "state.json").read_text())
        state["engine"]["step"] = step
        (folder / "state.json").write_text(json.dumps(state))
    return folder


def rewritten(file, change):
    """A safetensors file with other tensors and the same header."""
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def first(tensors, end):
    return next(name for name in tensors if end in name)


def spoil(end, value):
    def change(tensors):
        tensors[first(tensors, end)].view(-1)[-1] = value

    return change


def drop(end):
    return lambda tensors: tensors.pop(first(tensors, end))


def empty(end):
    return lambda tensors: tensors.update({first(tensors, end): torch.zeros(0)})


def miscount(tensors):
    for name in tensors:
        if "|step|" in name:
            tensors[name].fill_(7.0)


def special(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def with_tensors(change):
    return lambda path: rewritten(path, change)


def copied(source, target):
    return lambda path: shutil.copy(path.with_name(source), path.with_name(target))


def text(content):
    return lambda path: path.write_text(content)


def header(metadata):
    return lambda path: save_file(load_file(path), path, metadata)


def state_with(**changes):
    def damage(path):
        state = json.loads(path.read_text())
        state["engine"] |= changes
        path.write_text(json.dumps(state))

    return damage


# (kind, file, what happens to it, what the message says)
DAMAGES = [
    (kind, name, damage, message)
    for kind, name in [
        ("local", STATE), ("local", RNG), ("local", MODEL), ("local", OPTIMIZER), ("zero", SHARD0), ("zero", SHARD1),
    ]
    for damage, message in [
        (Path.unlink, "missing"),
        (special(os.mkfifo), "not a regular file"),
        (special(lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
        (special(os.mkdir), "not a regular file"),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), ""),
        (lambda path: path.write_bytes(b"\xff" * 1000), ""),
    ]
]  # fmt: skip
DAMAGES += [
    ("local", MODEL, with_tensors(spoil("norm.weight", float("nan"))), "norm.weight (weight) holds numbers that"),
    ("local", OPTIMIZER, with_tensors(spoil("exp_avg_sq", float("inf"))), "(exp_avg_sq) holds numbers"),
    ("local", OPTIMIZER, with_tensors(drop("|exp_avg_sq")), "(exp_avg_sq) is missing"),
    ("local", OPTIMIZER, with_tensors(drop("|step")), "(step) is missing"),
    ("local", OPTIMIZER, with_tensors(empty("|exp_avg")), "(exp_avg) has 0 elements, not"),
    ("local", MODEL, with_tensors(drop("head.bias")), "in the optimiser and not among the weights"),
    ("local", RNG, with_tensors(empty("cpu")), "no state of a random generator"),
    ("zero", SHARD0, with_tensors(spoil("|weight|", float("nan"))), "(weight) holds numbers"),
    ("zero", SHARD0, with_tensors(drop("|weight|0")), "(weight)"),
    ("zero", SHARD0, with_tensors(drop("|exp_avg|0")), "(exp_avg)"),
    ("zero", SHARD0, with_tensors(miscount), "(step) differs between shards"),
    ("zero", SHARD1, copied(SHARD0, SHARD1), "stored twice"),
    ("zero", SHARD1, copied(SHARD1, SHARD2), f"{SHARD2} belongs to another checkpoint"),
    ("zero", SHARD1, header({"shapes": '{"a": [1]}'}), "parts of another model"),
    ("zero", SHARD1, header(None), ""),
    ("local", STATE, text("[" * 100_000), "state.json"),
    ("local", STATE, text("[]"), "format None"),
    ("local", STATE, text('{"format": 1}'), ""),
    ("local", STATE, state_with(step="2"), "engine.step is 2"),
    ("local", STATE, state_with(step=9), "it is of step 9"),
    ("local", STATE, state_with(loss_sum=float("nan")), "engine.loss_sum is nan"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_each_damage_is_named_and_the_one_before_is_taken(tmp_path, caplog, number):
    kind, name, damage, message = DAMAGES[number]
    folder = copies(kind, tmp_path / "checkpoints")
    assert whole_checkpoint("auto", folder.parent)[0] == folder
    damage(folder / name)
    told = r"step-00000002 is damaged: .*; step-00000001 before it is whole"
    with pytest.raises(ValueError, match=told + ".*last_whole") as error:
        whole_checkpoint("auto", folder.parent)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=told + ": convert .*step-00000001$") as error:
        convert(folder, tmp_path / "encoder.safetensors")
    assert message in str(error.value) and os.listdir(tmp_path) == ["checkpoints"]
    path, state = whole_checkpoint("last_whole", folder.parent)
    assert path.name == "step-00000001" and state["engine"]["step"] == 1
    assert "step-00000002 is damaged" in caplog.text and "passed over" in caplog.text


def test_when_none_is_whole(tmp_path):
    assert whole_checkpoint("last_whole", tmp_path) == (None, {})
    folder = copies("local", tmp_path)
    for path in tmp_path.iterdir():
        (path / "rng.safetensors").unlink()
    with pytest.raises(ValueError, match=r"none before it is whole.*start over with train\.resume=none"):
        whole_checkpoint("auto", tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        whole_checkpoint("last_whole", tmp_path)
    with pytest.raises(ValueError, match=f"{folder} is damaged: rng.safetensors is missing"):
        whole_checkpoint(str(folder), tmp_path / "elsewhere")


def test_a_checkpoint_says_the_size_of_its_files(overrides, tmp_path):
    """A parameter whose moments are all gone looks like one that is not trained; the file is smaller."""
    assert main(["pretrain", *run_of(overrides, tmp_path)]) == 0
    folder = tmp_path / "run/checkpoints/step-00000004"
    check_whole(folder)
    name = first(load_file(folder / "optimizer.safetensors"), "norm.weight").rpartition("|")[0]
    for slot in ("exp_avg", "exp_avg_sq", "step"):
        rewritten(folder / "optimizer.safetensors", lambda tensors, slot=slot: tensors.pop(f"{name}|{slot}"))
    with pytest.raises(ValueError, match=r"optimizer\.safetensors has \d+ bytes, and had \d+ when it was written"):
        check_whole(folder)


def run_of(overrides, tmp_path, **changes):
    (tmp_path / "empty.yaml").write_text("")
    keys = {"train__steps": 4, "train__save_every": 2, "data__num_workers": 0} | changes
    return [str(tmp_path / "empty.yaml"), *overrides(tmp_path / "run", **keys)]


def test_a_run_goes_on_from_the_last_whole_one(overrides, tmp_path, capfd):
    assert main(["pretrain", *run_of(overrides, tmp_path)]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    (tmp_path / "run/checkpoints/step-00000004/state.json").unlink()
    capfd.readouterr()
    assert main(["pretrain", *run_of(overrides, tmp_path)]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "step-00000004 is damaged: state.json cannot be read: it is missing; step-00000002 before it is" in said
    assert main(["pretrain", *run_of(overrides, tmp_path, train__resume="last_whole")]) == 0
    assert "step-00000004 is damaged" in capfd.readouterr().err
    pair = [load_file(tmp_path / run / "encoder.safetensors") for run in ("run", "kept")]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[1])
    # Nothing is deleted: the damaged one was put aside.
    assert (tmp_path / "run/checkpoints.1/step-00000004/model.safetensors").is_file()


def test_weights_to_start_from_are_finite(overrides, tmp_path, capfd):
    assert main(["pretrain", *run_of(overrides, tmp_path)]) == 0
    rewritten(tmp_path / "run/encoder.safetensors", spoil("norm.weight", float("inf")))
    changes = {"output__dir": tmp_path / "new", "model__init_from": tmp_path / "run/encoder.safetensors"}
    assert main(["pretrain", *run_of(overrides, tmp_path, **changes)]) == 2
    assert "norm.weight holds numbers that are not finite" in capfd.readouterr().err.splitlines()[-1]
