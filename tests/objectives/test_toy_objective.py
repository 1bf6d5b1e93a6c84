"""An objective in one file outside the package, named by its import path: trained, resumed and planned by the CLI."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmim import cli
from fastmim.config import load_config
from fastmim.engine.build import build_objective
from fastmim.engine.optim import param_groups
from fastmim.plan import command

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("toy_objective.py")
NAME = "toy_objective:Toy"
TINY = {
    "model.name": "swinv2",
    "model.img_size": 32,
    "model.patch_size": 4,
    "model.embed_dim": 8,
    "model.depths": [1, 1],
    "model.num_heads": [1, 2],
    "model.window_size": 4,
    "objective.name": NAME,
    "objective.sharpness": 2,
    "objective.depth": 1,
    "data.num_workers": 0,
    "optim.lr": 1e-2,
    "optim.lr_batch": "null",
    "train.steps": 4,
    "train.micro_batch_size": 4,
    "train.log_every": 1,
    "output.loggers": "[]",
    "output.pictures": 2,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the toy in it, and a few pictures."""
    shutil.copy(TOY, tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):
        Image.new("RGB", (40, 36), (25 * i, 90, 250 - 25 * i)).save(images / f"{i}.png")
    (tmp_path / "empty.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    # PYTHONSAFEPATH leaves the working directory to us, as the installed command does.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for name, value in {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def keys(**changes):
    given = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in given.items()]


def fastmim(*argv, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "fastmim", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def pretrain(out, ranks=1, **changes):
    done = fastmim("pretrain", "empty.yaml", *keys(data__path="images", output__dir=out, **changes), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_it_pretrains_on_one_rank_and_resumes(folder):
    whole = pretrain("whole", data__val_path="images", train__save_every=2)
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert all(0 < abs(row["bias"]) < 2 for row in whole), "a scalar of the objective's own"
    assert "val_loss" in whole[-1] and whole[-1]["loss"] < whole[0]["loss"]
    assert load_file("whole/encoder.safetensors") and not Path("whole/reconstructions").exists()
    shutil.copytree("whole/checkpoints/step-00000002", "parts/checkpoints/step-00000002")
    parts = pretrain("parts", data__val_path="images")
    assert [row["step"] for row in parts] == [3, 4]
    for row, expected in zip(parts, whole[2:], strict=True):
        assert (row["loss"], row["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    # The saved config names it too.
    assert load_config("whole/config.yaml").objective.arguments() == {"sharpness": 2.0, "depth": 1}
    refused = fastmim("pretrain", "whole/config.yaml", "objective.sharpness=1")
    assert refused.returncode == 2 and "objective.sharpness=1.0 (checkpoint: 2.0)" in refused.stderr


def test_two_ranks_equal_one(folder):
    changes = dict(train__micro_batch_size=2, train__global_batch_size=4)
    one, two = pretrain("one", **changes), pretrain("two", ranks=2, **changes)
    for key in ("loss", "grad_norm", "epoch", "bias"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5), key


def test_the_planner_traces_it(folder, capsys, monkeypatch):
    """In processes of their own, which get the config and find the module again."""
    monkeypatch.setattr(command, "RECOMPUTE", ("none",))
    assert cli.main(["plan", "empty.yaml", *keys(), "--json"]) == 0
    objective = build_objective(load_config(None, keys()))
    count = sum(p.numel() for p in objective.parameters())
    assert json.loads(capsys.readouterr().out)["parameters"] == count


MISTAKES = [
    ({"objective__sharpness": -1}, "objective.sharpness=-1: must be > 0; use 1 or 2"),
    ({"objective__sharpness": "much"}, "objective.sharpness=much: expected a number"),
    ({"objective__depth": "true"}, "objective.depth=true: expected a number"),
    ({"objective__depth": 1.5}, "objective.depth=1.5: expected an integer"),
    ({"objective__sharpnes": 1}, "objective.sharpnes: unknown key; did you mean 'sharpness'? (keys of objective: name"),
    ({"objective__name": "simimm"}, "objective.name=simimm: unknown objective; did you mean 'simmim'?"),
    ({"objective__name": "toy_objectiv:Toy"}, "objective.name=toy_objectiv:Toy: there is no module 'toy_objectiv'"),
    ({"objective__name": "toy_objective:Toi"}, "has no Objective of that name; did you mean 'Toy'?"),
    ({"objective__name": "toy_objective:NotAnObjective"}, "has no Objective of that name; it has Toy"),
    ({"objective__name": ":Toy"}, "objective.name=:Toy: there is no module ''"),
]


@pytest.mark.parametrize("changes, message", MISTAKES)
def test_a_mistake_is_one_line(folder, changes, message):
    with pytest.raises(ValueError) as error:
        load_config(None, keys(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_exits_with_2_and_one_line(folder):
    done = fastmim("pretrain", "empty.yaml", *keys(objective__sharpness=0))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastmim: error: objective.sharpness=0: must be > 0; use 1 or 2\n"


def test_what_must_be_given_is_named(folder):
    with pytest.raises(ValueError, match="^objective.depth: required, but not given$"):
        load_config(None, [f"objective.name={NAME}"])


def test_a_fault_inside_the_module_is_not_hidden(folder):
    Path("broken_objective.py").write_text("import a_module_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        load_config(None, ["objective.name=broken_objective:Toy"])


def test_its_section_has_the_words_of_its_docstring(folder, capsys):
    assert cli.main(["config", "keys", *keys()]) == 0
    text = capsys.readouterr().out
    assert "# Predict the mean colour of an image.\nobjective:\n" in text
    assert "# power of the error; above 1, large errors count more (number; default 1.0)\n  sharpness: 2.0\n" in text
    assert "# layers of the head (integer; required)\n  depth: 1\n" in text
    assert "package.module:Class of your own" in text and "mask_ratio" not in text


def test_a_config_reaches_another_process(folder):
    cfg = load_config(None, keys())
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_groups_of_its_own_reach_the_optimiser(folder, monkeypatch):
    objective = build_objective(load_config(None, keys()))
    own = [{"name": "head", "params": list(objective.head.parameters()), "weight_decay": 0.5}]
    assert sum(len(group["params"]) for group in param_groups(objective, 0.1)) == len(list(objective.parameters()))
    monkeypatch.setattr(type(objective), "groups", lambda self, decay, policy: own)
    assert param_groups(objective, 0.1) == own


def test_examples_leave_the_generator_alone(folder):
    objective = build_objective(load_config(None, keys()))
    state = torch.get_rng_state()
    images, mask = objective.example(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and mask.shape == (3, 8, 8)
    assert torch.equal(images, objective.example(3)[0])
