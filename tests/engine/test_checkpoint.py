"""Checkpoints: complete or absent, never damaged, and never continued by another run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastmim.engine.checkpoint import (
    check_same_run,
    find_resume,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from fastmim.engine.checkpoint import save as saving
from fastmim.engine.distributed import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class FakeEngine:
    """Holds one number."""

    def __init__(self, step=0):
        self.step, self.value = step, 0.0

    def state(self):
        return {"step": self.step}

    def load_state(self, state):
        self.step = state["step"]

    def save(self, folder: Path):
        (folder / "value").write_text(str(self.step * 1.5))

    def load(self, folder: Path):
        self.value = float((folder / "value").read_text())


def save(root, step, keep=2):
    return save_checkpoint(root, FakeEngine(step), {"run": {"a": 1}}, keep=keep, world=ALONE)


def test_round_trip_with_random_state(tmp_path):
    torch.manual_seed(3)
    path = save(tmp_path / "checkpoints", 20)
    assert path.name == "step-00000020"
    expected = torch.rand(3)
    engine = FakeEngine()
    state = load_checkpoint(path, engine, world=ALONE, seed=0)
    assert (engine.step, engine.value, state["run"]) == (20, 30.0, {"a": 1})
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_rank_gets_its_own_generator(tmp_path):
    path = save(tmp_path, 4)
    draws = []
    for rank in (1, 2, 1):
        world = World(rank=rank, size=3, local_rank=0, device=torch.device("cpu"))
        load_checkpoint(path, FakeEngine(), world=world, seed=0)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[2] != draws[1]


def test_the_newest_are_kept_in_numeric_order(tmp_path):
    # 100 million steps: one more digit, which sorts before in text
    for step in (2, 10, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-99999999", "step-100000000"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def fail_at(monkeypatch, target, name, call):
    """Make the n-th call of a function fail as a kill would: everything before it has happened."""
    plain, calls = getattr(target, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapper)


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (FakeEngine, "save", 1),
        (saving, "save_file", 1),
        (Path, "write_text", 2),  # after the engine's own
        (saving.os, "fsync", 1),
        (saving.os, "fsync", 3),
        (Path, "rename", 1),  # of the finished folder
        (Path, "rename", 2),  # of the old one that is to be deleted
        (saving.shutil, "rmtree", 1),  # of the old one
    ],
)
def test_a_crash_while_saving_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, target, name, call):
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, target, name, call)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep=1)
    path = find_resume("auto", tmp_path)
    engine = FakeEngine()
    load_checkpoint(path, engine, world=ALONE, seed=0)
    assert engine.value == engine.step * 1.5
    assert engine.step in (1, 2)
    # the next save cleans up
    save(tmp_path, 3, keep=1)
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_what_resume_means(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert find_resume("auto", root) is None
    first, second = save(root, 1), save(root, 2)
    (root / ".partial-step-00000003").mkdir()
    (root / "notes.txt").write_text("step-00000009")
    assert find_resume("auto", root) == second
    assert find_resume("none", root) is None
    elsewhere = tmp_path / "other" / "checkpoints"
    assert find_resume(str(first), elsewhere) == first
    assert find_resume(str(root), elsewhere) == second
    assert find_resume(str(root.parent), elsewhere) == second
    with pytest.raises(ValueError, match="train.resume=.*no complete checkpoint"):
        find_resume(str(tmp_path / "nowhere"), root)


def test_checkpoints_of_another_history_are_set_aside(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(root, step, keep=9)
    set_aside(root, after_step=2)
    set_aside(root, after_step=2)
    assert [path.name for path in list_checkpoints(root)] == ["step-00000001", "step-00000002"]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints.1")] == ["step-00000003"]
    set_aside(root, after_step=-1)
    assert list_checkpoints(root) == []
    assert len(list_checkpoints(tmp_path / "checkpoints.2")) == 2


def test_another_run_is_refused():
    stored = {"model.name": "swin", "optim.lr": 0.1, "train.seed": 0}
    check_same_run(stored, dict(stored), Path("c"))
    with pytest.raises(
        ValueError, match=r"model.name=swinv2 \(checkpoint: swin\); optim.lr=0.2 .*another run"
    ):
        check_same_run(stored, stored | {"model.name": "swinv2", "optim.lr": 0.2}, Path("c"))


def test_what_may_change_and_what_may_never():
    stored = {"model.name": "swin", "optim.lr": 0.1, "optim.clip_grad": None, "optim.betas": [0.9, 0.999]}
    slower = stored | {"optim.lr": 0.01, "optim.clip_grad": 1.0}
    with pytest.raises(ValueError, match=r"optim.clip_grad=1.0 \(checkpoint: null\).*train.resume_changes=allow"):
        check_same_run(stored, slower, Path("c"))
    changes = check_same_run(stored, slower, Path("c"), allow=True)
    assert changes == {"optim.lr": [0.1, 0.01], "optim.clip_grad": [None, 1.0]}
    for key, value in {"model.name": "swinv2", "optim.betas": [0.8, 0.9]}.items():
        with pytest.raises(ValueError, match=rf"{key}=.*another run: {key} may never change"):
            check_same_run(stored, slower | {key: value}, Path("c"), allow=True)


@pytest.mark.parametrize("name", ["state.json", "rng.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"train.resume: cannot .*{path.name}") as error:
        load_checkpoint(path, FakeEngine(), world=ALONE, seed=0)
    assert "\n" not in str(error.value)
