"""A full disk, a quota, a folder that vanishes, an output that nobody reads: one line, and no work lost."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import shutil
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmim import cli
from fastmim.engine.checkpoint import check_whole, list_checkpoints, save_checkpoint
from fastmim.engine.distributed import World
from fastmim.engine.local import LocalEngine
from fastmim.engine.metrics import Metrics, read_rows
from fastmim.engine.progress import Progress
from fastmim.engine.run import Run
from fastmim.engine.train import train

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@contextmanager
def largest_file(size):
    """The kernel refuses to write more, as it does where a disk is full: in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail(number):
    def raises(*_, **__):
        raise OSError(number, os.strerror(number))

    return raises


@pytest.fixture
def engine(objective):
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    engine = LocalEngine(objective, optimizer)
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return engine


def save(root, engine, step):
    engine.steps = step
    extra = {"run": {}, "total": 9, "images": "none"}
    return save_checkpoint(root, engine, extra, keep=5, world=ALONE)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_save_that_fails_leaves_those_before_it(engine, tmp_path, file):
    """The room ends one byte before the end of the file; the moments need more of it than the weights."""
    root = tmp_path / "checkpoints"
    first = save(root, engine, 1)
    room = (first / file).stat().st_size - 1
    with largest_file(room), pytest.raises(OSError, match="step-00000001 is the last") as caught:
        save(root, engine, 2)
    assert caught.value.errno == errno.EFBIG and str(root) in caught.value.filename
    assert list(root.iterdir()) == [first]
    check_whole(first)
    check_whole(save(root, engine, 2))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.write_text", "pathlib.Path.rename"])
def test_a_save_may_fail_at_its_end(engine, tmp_path, monkeypatch, number, where):
    root = tmp_path / "checkpoints"
    with monkeypatch.context() as patched, pytest.raises(OSError, match="there is no checkpoint yet") as caught:
        patched.setattr(where, fail(number))
        save(root, engine, 1)
    assert caught.value.errno == number and str(root) in caught.value.filename and not list(root.iterdir())
    check_whole(save(root, engine, 1))


@pytest.mark.parametrize(
    "where, named",
    [
        ("PIL.Image:Image.save", "reconstructions/step-00000002.png"),
        ("matplotlib.figure:Figure.savefig", "loss.png"),
        ("fastmim.engine.local:save_file", "checkpoints/.partial-step-00000002"),
        ("fastmim.engine.checkpoint.convert:write_safetensors", "encoder.safetensors"),
    ],
)
def test_a_run_without_room_ends_in_one_line(overrides, tmp_path, monkeypatch, capsys, where, named):
    module, names = where.split(":")
    owner, name = ([None, *names.split(".")])[-2:]
    home = pytest.importorskip(module) if module.startswith("matplotlib") else import_module(module)
    monkeypatch.setattr(getattr(home, owner) if owner else home, name, fail(errno.ENOSPC))
    # The command configures the logger; other tests want it as it was.
    monkeypatch.setattr(logging.getLogger("fastmim"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("fastmim"), "level", logging.INFO)
    out = tmp_path / "run"
    changes = dict(train__steps=2, data__num_workers=0, output__pictures=2)
    config = tmp_path / "empty.yaml"
    config.touch()
    assert cli.main(["pretrain", str(config), *overrides(out, **changes)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fastmim: error: {out / named}: no space left on device")
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".partial") or ".partial-" in path.name]


def test_rows_without_room_name_the_file(tmp_path):
    metrics = Metrics(tmp_path, start=0, loggers=(), settings={}, enabled=True)
    metrics._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as caught:
        metrics.write({"step": 1})
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_that_vanishes_costs_no_step(settings, tmp_path, monkeypatch, moved, caplog):
    out, went_on = tmp_path / "run", Run.after_step

    def vanish(run, step, lr):
        if step == 3:
            shutil.move(out, tmp_path / "elsewhere") if moved else shutil.rmtree(out)
        went_on(run, step, lr)

    config = settings(out, train__steps=9, data__num_workers=0, train__save_every=100)
    with monkeypatch.context() as patched, pytest.raises(FileNotFoundError, match="deleted or moved") as caught:
        patched.setattr(Run, "after_step", vanish)
        train(config)
    assert caught.value.filename == f"output.dir={out}" and "step-00000003" in caught.value.strerror
    check_whole(list_checkpoints(out / "checkpoints")[-1])
    assert train(config).steps == 9
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["checkpoints", "reconstructions", "tensorboard", "encoder.safetensors", "loss.png",
                                  "config.json", "metrics.jsonl", "config.yaml", "bad_files.json", "wandb",
                                  "metrics.csv"])
def test_names_that_are_taken_are_said_before_the_first_step(settings, tmp_path, monkeypatch, name):
    monkeypatch.setattr("fastmim.engine.train.train_step", None)
    tmp_path.joinpath(name).mkdir() if "." in name else tmp_path.joinpath(name).touch()
    with pytest.raises(ValueError, match=rf"output.dir=.*: {name} in it is"):
        train(settings(tmp_path, data__num_workers=0))


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stdout", [lambda: open("/dev/full", "w"), broken_pipe])  # noqa: SIM115
def test_a_run_goes_on_where_nobody_reads_it(stdout, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", stdout())
    progress = Progress(total_steps=3, start=0, enabled=True)
    progress.say("one")
    progress.say("two")
    progress.close()
    assert [r.getMessage() for r in caplog.records if "the run goes on without it" in r.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    sys.stdout = io.StringIO()  # the other one is flushed when it is deleted


def test_photographs_are_not_cut_off_in_silence(tmp_path):
    """Pillow takes a part of a JPEG for all of it where the disk becomes full in between."""
    pytest.importorskip("skimage")
    from fastmim.data import make_demo

    with largest_file(2048), pytest.raises(OSError, match="File too large") as caught:
        make_demo(tmp_path)
    assert Path(caught.value.filename).suffix == ".jpg"
    make_demo(tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        Image.open(path).load()
