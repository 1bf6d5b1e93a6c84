"""Whole runs of a tiny model on real files: outputs, restarts after kills, signals, several ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastmim.engine import build as building
from fastmim.engine import train as train_module
from fastmim.engine.checkpoint import list_checkpoints
from fastmim.engine.local import LocalEngine
from fastmim.engine.metrics import read_rows
from fastmim.engine.stream import batch_sizes
from fastmim.engine.train import train

ROOT = Path(__file__).parents[2]
TIMINGS = ("images_per_sec", "step_time", "data_time", "peak_memory_gib")

SCRIPT = """
import os, sys
from pathlib import Path
from fastmim.config import load_config
from fastmim.engine.distributed import exit_process
from fastmim.engine.train import train

if __name__ == "__main__":
    Path(__file__).with_name("pid-" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
    result = train(load_config(None, sys.argv[1:]))
    exit_process(0)
"""


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths}


def start(folder, overrides, launcher=(), program=None):
    script = folder / "pretrain.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, *(program or [str(script)]), *overrides]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where nohup runs the tests it is ignored, which a run honours.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def rows(folder):
    """Logged rows without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder / "metrics.jsonl")]


def weights(folder):
    return load_file(list_checkpoints(folder / "checkpoints")[-1] / "model.safetensors")


def assert_same_run(one, other):
    assert rows(one) == rows(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def wait_for_rows(process, folder, count):
    path, limit = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"no {count} steps: {process.communicate()[0]}")


def test_a_run_leaves_everything(settings, pictures, tmp_path, capsys):
    changes = {
        "train__steps": 6,
        "train__log_every": 2,
        "train__val_every": 3,
        "train__picture_every": 3,
        "train__save_every": 2,
        "data__val_path": pictures,
        "output__pictures": 2,
        "output__loggers": ["tensorboard"],
    }
    result = train(settings(tmp_path, **changes))
    assert [row["step"] for row in rows(tmp_path)] == [2, 3, 4, 6]
    assert [row["step"] for row in rows(tmp_path) if "val_loss" in row] == [3, 6]
    first = read_rows(tmp_path / "metrics.jsonl")[0]
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "memory_kind", *TIMINGS}
    assert set(first) == keys
    assert first["epoch"] == pytest.approx(2 / (22 // 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad_files.json",
        "checkpoints",
        "config.json",
        "config.yaml",
        "encoder.safetensors",
        "loss.png",
        "metrics.jsonl",
        "reconstructions",
        "tensorboard",
    ]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]
    assert sorted(os.listdir(tmp_path / "reconstructions")) == ["step-00000003.png", "step-00000006.png"]
    with Image.open(result.picture_path) as picture:
        assert picture.height == 24 + 2 * 196
    assert load_file(result.encoder_path)
    last = rows(tmp_path)[-1]
    assert (result.steps, result.loss, result.val_loss) == (6, last["loss"], last["val_loss"])
    assert (result.images_seen, result.interrupted) == (24, False)
    said = capsys.readouterr().out
    closing = said[said.index(" done: 6 steps") :]
    for path in (
        result.encoder_path,
        result.picture_path,
        result.checkpoint_path,
        tmp_path / "metrics.jsonl",
    ):
        assert str(path) in closing
    banner = said[: said.index(" step 1/6 ")]
    for words in ("1 thread,", "fp32, kernels: torch", "22, 5 steps an epoch", "4 images a step", "(1.2 epochs)"):
        assert words in banner


def test_the_loss_of_a_row_is_the_mean_since_the_last(settings, tmp_path):
    train(settings(tmp_path / "each", train__steps=4))
    train(settings(tmp_path / "pairs", train__steps=4, train__log_every=2))
    each = [row["loss"] for row in rows(tmp_path / "each")]
    pairs = [row["loss"] for row in rows(tmp_path / "pairs")]
    assert pairs == pytest.approx([sum(each[:2]) / 2, sum(each[2:]) / 2], rel=1e-12)


def test_rows_by_time_change_no_other(settings, tmp_path):
    train(settings(tmp_path / "steps", train__steps=8, train__log_every=4))
    train(settings(tmp_path / "time", train__steps=8, train__log_every=4, train__log_seconds=1e-9))
    found = rows(tmp_path / "time")
    assert [row["step"] for row in found] == list(range(2, 9))
    assert [row for row in found if row["step"] % 4 == 0] == rows(tmp_path / "steps")


def test_other_scalars_of_the_objective_are_logged(settings, tmp_path, monkeypatch):
    def with_scalar(cfg):
        objective = build_objective(cfg)
        forward = objective.forward
        objective.forward = lambda images, mask: (out := forward(images, mask)) | {"twice": 2 * out["loss"]}
        return objective

    build_objective = building.build_objective
    monkeypatch.setattr(building, "build_objective", with_scalar)
    train(settings(tmp_path, train__steps=4, train__log_every=2, train__grad_accum_steps=2))
    assert [row["twice"] for row in rows(tmp_path)] == pytest.approx([2 * row["loss"] for row in rows(tmp_path)])


def test_learning_rates_of_a_run(settings, tmp_path):
    changes = {
        "optim__lr": 0.512,
        "optim__warmup_lr": 0.0,
        "optim__warmup_steps": 2,
        "optim__schedule": "constant",
    }
    train(settings(tmp_path / "plain", train__steps=4, **changes))
    train(settings(tmp_path / "parity", train__steps=4, optim__policy="parity", **changes))
    # global batch 4 of 512: 0.004; parity is one step late
    assert [row["lr"] for row in rows(tmp_path / "plain")] == pytest.approx([0, 0.002, 0.004, 0.004])
    assert [row["lr"] for row in rows(tmp_path / "parity")] == pytest.approx([0, 0, 0.002, 0.004])


def test_killed_and_resumed_equals_never_killed(settings, overrides, tmp_path):
    changes = {"train__save_every": 3, "train__grad_accum_steps": 2, "train__steps": 40}
    kill_at = random.randint(4, 20)  # 2 steps an epoch: in the middle of one, or at its end
    print("killed after step", kill_at)
    process = start(tmp_path, overrides(tmp_path / "killed", **changes))
    wait_for_rows(process, tmp_path / "killed", kill_at)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    saved = list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert saved
    assert saved[-1].name != "step-00000040"
    train(settings(tmp_path / "killed", **changes))
    train(settings(tmp_path / "whole", **changes))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("stop_at", [1, 5])  # 5: the end of an epoch
def test_resuming_between_log_steps(settings, tmp_path, stop_at, monkeypatch):
    """The mean of a row covers losses from before and after the restart."""
    changes = {"train__log_every": 4, "train__steps": 8, "optim__schedule": "constant"}
    train(settings(tmp_path / "whole", **changes))
    monkeypatch.setattr(train_module.StopRequest, "agreed", stopper(stop_at))
    result = train(settings(tmp_path / "parts", **changes))
    assert result.interrupted
    assert result.steps == stop_at
    monkeypatch.undo()
    train(settings(tmp_path / "parts", **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def stopper(calls):
    count = iter(range(1, 10_000))
    return lambda self, also: (int(next(count) >= calls and signal.SIGTERM), also)


STOP = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.mark.parametrize("number", STOP, ids=lambda number: number.name)
def test_a_signal_saves_and_exits_with_its_number(overrides, tmp_path, number):
    (tmp_path / "empty.yaml").touch()
    command = ["-m", "fastmim", "pretrain", str(tmp_path / "empty.yaml")]
    process = start(tmp_path, overrides(tmp_path / "run", train__steps=5000), program=command)
    wait_for_rows(process, tmp_path / "run", 3)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: the data workers get it too
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 128 + number, output
    once_more = "; once more aborts without saving" if number in STOP[:2] else ""
    assert f"{number.name}: stopping after this micro-batch and saving{once_more}\n" in output
    steps = len(rows(tmp_path / "run"))
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert path.name == f"step-{steps:08d}"
    assert f"interrupted by {number.name} at step {steps} of 5000\n" in output
    assert output.endswith(f"fastmim convert {tmp_path / 'run'} encoder.safetensors\n")
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


@pytest.mark.parametrize(("calls", "steps"), [(2, 0), (8, 2)])
def test_a_stop_between_micro_batches_costs_their_step_only(settings, tmp_path, monkeypatch, calls, steps):
    """Asked after every micro-batch; dropout, masks, order and the means of rows go on as if nothing had happened."""
    changes = {"train__grad_accum_steps": 3, "train__steps": 4, "train__log_every": 2}
    train(settings(tmp_path / "whole", **changes))
    monkeypatch.setattr(train_module.StopRequest, "agreed", stopper(calls))
    result = train(settings(tmp_path / "parts", **changes))
    assert (result.interrupted, result.stopped_by, result.steps) == (True, signal.SIGTERM, steps)
    monkeypatch.undo()
    train(settings(tmp_path / "parts", **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


ABORT = """
import hashlib, os, signal, threading, time
from fastmim.engine.interrupt import StopRequest

def ask():
    for seconds in (0.2, 0.2, 1.2):  # the second comes with the first, as a launcher passes it on
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

with StopRequest(ends_process=True):
    threading.Thread(target=ask, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_000_000_000)  # minutes in C: no handler of Python's can run
"""


def test_a_second_signal_aborts_whatever_the_process_does(tmp_path):
    process = subprocess.run([sys.executable, "-c", ABORT], env=environment(), capture_output=True, text=True,
                             timeout=400)  # fmt: skip
    assert process.returncode == 130
    assert process.stderr.splitlines() == ["SIGINT: stopping after this micro-batch and saving; once more aborts "
        "without saving", "SIGINT again: aborting, nothing is saved; the last checkpoint is as it was"]  # fmt: skip


def test_a_longer_cosine_is_refused(settings, tmp_path):
    """Its rate was at its end, and would be near the top again."""
    short = {"optim__lr_batch": None, "optim__lr": 1e-2, "data__num_workers": 0}
    train(settings(tmp_path, train__steps=2, **short))
    message = (
        r"train.steps=8 \(checkpoint: 2\): the learning rate would jump from 0.005 to 0.00854 at step 2; "
        r"take that with train.resume_changes=allow, branch from it with train.branch_from=.*step-00000002 and a new"
    )
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, train__steps=8, **short))
    result = train(settings(tmp_path, train__steps=8, train__resume_changes="allow", **short))
    state = json.loads((result.checkpoint_path / "state.json").read_text())
    assert state["changes"] == [{"step": 2, "train.steps": [2, 8]}]


TAIL = {"optim__schedule": "multistep", "train__save_every": 2, "train__keep": 9, "train__steps": 6}


def test_a_branch_is_the_run_that_had_its_schedule_from_the_start(settings, tmp_path, monkeypatch):
    train(settings(tmp_path / "trunk", optim__milestone_steps="[5]", **TAIL))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trunk").rglob("*")}
    train(settings(tmp_path / "other", optim__milestone_steps="[3]", **TAIL))
    origin = tmp_path / "trunk" / "checkpoints" / "step-00000002"
    same = settings(tmp_path / "same", optim__milestone_steps="[5]", train__branch_from=origin, **TAIL)
    train(same)
    assert_same_run(tmp_path / "same", tmp_path / "trunk")
    # Another tail, interrupted: its second start goes on with the branch.
    branch = settings(tmp_path / "branch", optim__milestone_steps="[3]", train__branch_from=origin, **TAIL)
    monkeypatch.setattr(train_module.StopRequest, "agreed", stopper(3))
    assert train(branch).steps == 5
    monkeypatch.undo()
    state = json.loads((train(branch).checkpoint_path / "state.json").read_text())
    assert_same_run(tmp_path / "branch", tmp_path / "other")
    assert state["branch"] == {"from": str(origin), "step": 2}
    assert state["changes"] == [{"step": 2, "optim.milestone_steps": [[5], [3]]}]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "trunk").rglob("*")}
    for changes, message in (
        ({"output__dir": tmp_path / "trunk", "train__resume": "none"}, "it is the run to branch from"),
        ({"output__dir": tmp_path / "trunk"}, "it is the run to branch from"),
        ({"output__dir": tmp_path / "other"}, "it has a run that is no branch"),
        ({"train__resume": origin}, "beside train.branch_from"),
        ({"model__embed_dim": 16}, "model.embed_dim=16"),
        ({"train__branch_from": tmp_path}, "train.branch_from=.*: no complete checkpoint"),
    ):
        wrong = {"train__branch_from": origin, **TAIL, "optim__milestone_steps": "[3]", **changes}
        with pytest.raises(ValueError, match=message):
            train(settings(wrong.pop("output__dir", tmp_path / "new"), **wrong))


def test_a_finished_run_started_again_only_reports(settings, tmp_path):
    first = train(settings(tmp_path, train__steps=2))
    before = rows(tmp_path)
    second = train(settings(tmp_path, train__steps=2))
    assert (second.steps, second.loss) == (2, first.loss)
    assert rows(tmp_path) == before


def test_resume_none_starts_over_and_keeps_the_old_checkpoints(settings, tmp_path, caplog):
    train(settings(tmp_path, train__steps=3, train__save_every=1))
    train(settings(tmp_path, train__steps=2, train__resume="none"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    assert len(list_checkpoints(tmp_path / "checkpoints.1")) == 2
    assert len((tmp_path / "checkpoints.1" / "metrics.jsonl").read_text().splitlines()) == 3
    assert "moved to" in caplog.text


@pytest.mark.parametrize("at", ["copy2", "rename"])
def test_a_restart_that_was_cut_short_can_be_repeated(settings, tmp_path, monkeypatch, at):
    """Killed while the old checkpoints are set aside: nothing of them is lost, and the same request works again."""
    train(settings(tmp_path, train__steps=3, train__save_every=1, train__seed=7, train__keep=3))
    again = settings(tmp_path, train__steps=2, train__resume="none", train__seed=0)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil if at == "copy2" else Path, at, killed)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 3
    (tmp_path / "metrics.partial").write_text("half")
    (tmp_path / ".encoder.safetensors.1.tmp").write_text("half")
    (tmp_path / "reconstructions").mkdir(exist_ok=True)
    (tmp_path / "reconstructions" / "step-00000001.partial").write_text("half")
    assert train(again).steps == 2
    assert len(list_checkpoints(tmp_path / "checkpoints.1")) == 3
    assert len((tmp_path / "checkpoints.1" / "metrics.jsonl").read_text().splitlines()) == 3
    left = [path.name for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".tmp", ".owner.json"))]
    assert left == []


def test_a_schedule_that_the_run_does_not_reach_is_a_warning(settings, tmp_path, caplog):
    changes = {"optim__schedule": "multistep", "optim__milestone_steps": "[9]", "optim__warmup_steps": 2}
    train(settings(tmp_path, train__steps=2, **changes))
    assert "ends at step 2, inside its warm-up of 2" in caplog.text
    assert "ends at step 2, before the drops at [9]" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__embed_dim": 16}, r"model.embed_dim=16 \(checkpoint: 8\).*another run"),
        ({"optim__lr": 0.5}, "optim.lr=0.5"),
        ({"train__seed": 7}, "train.seed=7"),
        ({"train__micro_batch_size": 2}, "train.global_batch_size=2"),
        ({"train__steps": 1}, "train.steps=1: .* at step 2 already"),
        ({"data__path": "null"}, "data.path=null"),
        ({"data__val_path": "/nowhere"}, "data.val_path=/nowhere: no such folder"),
        ({"output__dir": __file__}, "output.dir=.*: cannot be created .is a file"),
        ({"train__resume": "nowhere"}, "train.resume=nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(settings, tmp_path, changes, message):
    train(settings(tmp_path, train__steps=2))
    with pytest.raises(ValueError, match=message) as error:
        train(settings(tmp_path, **{"train__steps": 2} | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "goes_on"), [(44, False), (40, True)])
def test_a_checkpoint_without_a_policy_is_of_timms_way(settings, tmp_path, size, goes_on):
    """On maps that it matters for; there `model.policy=parity` goes on as the run began."""
    changes = {"model__img_size": size, "objective__unit": 4, "optim__schedule": "constant"}
    train(settings(tmp_path, train__steps=1, model__policy="parity", **changes))
    file = list_checkpoints(tmp_path / "checkpoints")[-1] / "state.json"
    state = json.loads(file.read_text())
    assert state["run"].pop("model.policy") == "parity"
    file.write_text(json.dumps(state))
    if not goes_on:
        with pytest.raises(ValueError, match=r"model.policy=default \(checkpoint: parity\): .* is another run"):
            train(settings(tmp_path, train__steps=2, **changes))
    train(settings(tmp_path, train__steps=2, **({} if goes_on else {"model__policy": "parity"}), **changes))


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, "default"), ({"optim__policy": "parity"}, "parity"),
    ({"optim__policy": "parity", "model__policy": "default"}, "default"),
])  # fmt: skip
def test_the_encoder_takes_the_policy_of_the_optimiser(settings, tmp_path, changes, expected):
    """Unless it has its own; the exported file says which."""
    result = train(settings(tmp_path, train__steps=1, **changes))
    with safe_open(result.encoder_path, "pt") as file:
        assert json.loads(file.metadata()["encoder"])["policy"] == expected


def test_the_same_global_batch_on_other_micro_batches_goes_on(settings, tmp_path):
    same = {"model__drop_path_rate": 0, "optim__schedule": "constant"}
    train(settings(tmp_path / "parts", train__steps=2, **same))
    split = {"train__micro_batch_size": 2, "train__global_batch_size": 4}
    train(settings(tmp_path / "parts", train__steps=7, **same, **split))
    train(settings(tmp_path / "whole", train__steps=7, **same))
    expected = [row["loss"] for row in rows(tmp_path / "whole")]
    assert [row["loss"] for row in rows(tmp_path / "parts")] == pytest.approx(expected, rel=1e-4)


def test_batch_sizes():
    given = {"micro_batch_size": 2, "grad_accum_steps": 1, "global_batch_size": 12, "world_size": 2}
    assert batch_sizes(**given) == (3, 12)
    assert batch_sizes(**given | {"global_batch_size": None, "grad_accum_steps": 5}) == (5, 20)
    with pytest.raises(ValueError, match="train.global_batch_size=13: not a multiple of 4 .* use 12"):
        batch_sizes(**given | {"global_batch_size": 13})
    with pytest.raises(ValueError, match="not a multiple of 16 .* use train.micro_batch_size=6, or .*_size=16"):
        batch_sizes(**given | {"micro_batch_size": 8})
    with pytest.raises(ValueError, match="train.grad_accum_steps=2: global_batch_size=12 needs 3"):
        batch_sizes(**given | {"grad_accum_steps": 2})


@pytest.mark.parametrize("check_every_step", [True, False])
def test_a_non_finite_loss_names_step_and_module(settings, tmp_path, monkeypatch, check_every_step):
    def broken(cfg, objective, world, deepspeed):
        engine = make_engine(cfg, objective, world, deepspeed)
        engine.check_every_step = check_every_step
        objective.encoder.layers[0].blocks[1].mlp.register_forward_hook(
            lambda module, args, out: out * (float("nan") if engine.steps >= 4 else 1.0)
        )
        return engine

    make_engine = building.make_engine
    monkeypatch.setattr(building, "make_engine", broken)
    with pytest.raises(FloatingPointError, match=r"step 5: .*encoder\.layers\.0\.blocks\.1") as error:
        train(settings(tmp_path, train__log_every=6, train__save_every=3, model__drop_path_rate=0))
    assert "\n" not in str(error.value)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]


def test_init_from_and_bad_files(settings, tmp_path, pictures):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(pictures.iterdir())[:6]:
        (images / path.name).write_bytes(path.read_bytes())
    (images / "übel.jpg").write_text("no image")
    changes = {"data__path": images, "train__steps": 1}
    first = train(settings(tmp_path / "a", **changes))
    (name,) = first.bad_files
    assert name.endswith("übel.jpg")
    stored = json.loads((tmp_path / "a" / "bad_files.json").read_text(encoding="utf-8"))
    assert stored == first.bad_files
    changes |= {"model__init_from": first.encoder_path, "optim__lr": 0.0, "optim__warmup_lr": 0.0}
    second = train(settings(tmp_path / "b", **changes))
    ours, theirs = load_file(first.encoder_path), load_file(second.encoder_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("key", ["efficiency__fused_optimizer", "data__num_workers", "efficiency__kernels"])
def test_efficiency_does_not_change_the_loss(settings, tmp_path, key):
    value = {
        "efficiency__fused_optimizer": False,
        "data__num_workers": 0,
        "efficiency__kernels": "reference",
    }[key]
    train(settings(tmp_path / "a", train__steps=4))
    train(settings(tmp_path / "b", train__steps=4, **{key: value}))
    expected = [row["loss"] for row in rows(tmp_path / "a")]
    assert [row["loss"] for row in rows(tmp_path / "b")] == pytest.approx(expected, rel=1e-4)


def test_two_ranks_equal_one(settings, overrides, pictures, tmp_path):
    """Same global batch on 1 and on 2 ranks; fp32 sums in another order: losses to 1e-5, weights to 1e-3."""
    changes = {
        "train__steps": 7,
        "train__global_batch_size": 8,
        "train__micro_batch_size": 2,
        "train__save_every": 4,
        "train__val_every": 7,
        "data__val_path": pictures,
        "data__num_workers": 1,
        "model__drop_path_rate": 0,
    }
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start(tmp_path, overrides(tmp_path / "two", **changes), launcher)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    train(settings(tmp_path / "one", **changes))
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for key in ("loss", "grad_norm", "lr", "epoch"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-4), key
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    theirs = weights(tmp_path / "two")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    generators = load_file(list_checkpoints(tmp_path / "two" / "checkpoints")[-1] / "rng.safetensors")
    assert set(generators) == {"0.cpu", "1.cpu"}
    # and it goes on alone, from the two ranks' checkpoint
    longer = changes | {"train__steps": 9, "train__resume_changes": "allow"}
    assert train(settings(tmp_path / "two", **longer)).steps == 9


def test_engine_is_used_through_its_contract_only(settings, tmp_path, monkeypatch):
    """backward, step and read are called as often as promised: per micro-batch, and per logged step."""
    calls = {"backward": 0, "step": 0, "read": 0}
    for name in calls:
        plain = getattr(LocalEngine, name)

        def counted(self, *args, _name=name, _plain=plain):
            calls[_name] += 1
            return _plain(self, *args)

        monkeypatch.setattr(LocalEngine, name, counted)
    train(settings(tmp_path, train__steps=6, train__grad_accum_steps=2, train__log_every=3))
    assert calls == {"backward": 12, "step": 12, "read": 3}  # the first step is shown too


def test_ranks_stop_at_the_same_step(overrides, tmp_path):
    """Only one of two ranks gets the signal; both leave after one step and write one checkpoint."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    changes = {"train__steps": 5000, "train__save_every": 0, "train__grad_accum_steps": 3}
    process = start(tmp_path, overrides(tmp_path / "run", **changes), launcher)
    wait_for_rows(process, tmp_path / "run", 3)
    pids = {int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)}
    os.kill(min(pids), signal.SIGTERM)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert path.name == f"step-{len(rows(tmp_path / 'run')):08d}"
    assert "interrupted by SIGTERM at step" in output


DIVERGING = dict(train__steps=8, train__save_every=1, optim__warmup_steps=6, data__num_workers=0)


def test_the_advice_of_a_run_that_diverged_can_be_followed(settings, tmp_path):
    """The update of step 2 spoils the weights; the checkpoint of step 1 is from before it."""
    with pytest.raises(FloatingPointError, match="at step 3: .*train.resume_changes=allow.*go back with") as error:
        train(settings(tmp_path, **DIVERGING, optim__lr=1e38, optim__clip_grad=None))
    earlier = str(tmp_path / "checkpoints" / "step-00000001")
    assert str(error.value).endswith(f"train.resume={earlier}")
    followed = DIVERGING | {"optim__lr": 1e-3, "optim__clip_grad": 1.0, "train__resume": earlier}
    with pytest.raises(ValueError, match=r"optim.lr=0.001 \(checkpoint: 1e\+38\).*train.resume_changes=allow"):
        train(settings(tmp_path, **followed))
    result = train(settings(tmp_path, **followed, train__resume_changes="allow"))
    assert result.steps == 8 and [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    assert max(row["lr"] for row in rows(tmp_path)) <= 1e-3
    state = json.loads((result.checkpoint_path / "state.json").read_text())
    assert state["run"]["optim.lr"] == 1e-3
    assert state["changes"] == [{"step": 1, "optim.lr": [1e38, 1e-3], "optim.clip_grad": [None, 1.0]}]
    # It is the same run from here on, and a later change is noted behind the first.
    longer = DIVERGING | {"optim__lr": 1e-3, "optim__clip_grad": 1.0, "train__steps": 9}
    longer["train__resume_changes"] = "allow"
    result = train(settings(tmp_path, **longer))
    state = json.loads((result.checkpoint_path / "state.json").read_text())
    assert [change["step"] for change in state["changes"]] == [1, 8]


def test_a_changed_rate_gives_the_steps_of_that_rate(settings, tmp_path):
    """The same weights and moments, with the rate of the new settings and nothing else."""
    quick = dict(train__steps=6, train__save_every=3, optim__schedule="constant", data__num_workers=0)
    train(settings(tmp_path / "a", **quick))
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-00000003", tmp_path / "b" / "checkpoints" / "step-00000003")
    changes = {"optim__lr": 0.0, "optim__warmup_lr": 0.0, "train__resume_changes": "allow"}
    result = train(settings(tmp_path / "b", **quick | changes))
    before = load_file(tmp_path / "b" / "checkpoints" / "step-00000003" / "model.safetensors")
    after = load_file(result.checkpoint_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
