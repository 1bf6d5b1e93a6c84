"""Rows on disk, the clock, the progress lines."""

from __future__ import annotations

import json
import time

from fastmim.engine.loggers import LOGGERS
from fastmim.engine.metrics import Metrics, StepClock, peak_memory, read_rows
from fastmim.engine.progress import Progress, format_duration

ROW = {"epoch": 0.5, "loss": 1.25, "lr": 1e-4, "grad_norm": 2.0, "images_per_sec": 10.0}


def write(folder, start, steps, **options):
    metrics = Metrics(folder, start=start, **{"loggers": (), "settings": {}, "enabled": True} | options)
    for step in steps:
        metrics.write({"step": step} | ROW)
    metrics.close()


def steps_of(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_resuming_cuts_rows_after_the_checkpoint(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    write(tmp_path, 2, [3, 4])
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, 0, [1])
    assert steps_of(tmp_path) == [1]


def test_silent_ranks_write_nothing(tmp_path):
    write(tmp_path, 0, [1], loggers=list(LOGGERS), enabled=False)
    assert list(tmp_path.iterdir()) == []


def test_clock_counts_training_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock()
    for _ in range(4):
        with clock.waiting():
            now[0] += 0.25
        now[0] += 0.75
    with clock.paused():
        now[0] += 100
    assert clock.read(4, 32) == {"images_per_sec": 8.0, "step_time": 1.0, "data_time": 0.25}
    now[0] += 2
    assert clock.read(1, 4) == {"images_per_sec": 2.0, "step_time": 2.0, "data_time": 0.0}


def test_memory_is_positive_and_named():
    gib, kind = peak_memory()
    assert 0.01 < gib < 10_000
    assert kind in ("rss", "cuda")


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = Progress(total_steps=20, start=0, enabled=True)
    progress.advance(9)
    progress.row({"step": 10, "val_loss": 0.5} | ROW)
    progress.say("done")
    progress.close()
    line, done = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "step 10/20  epoch 0.50  loss 1.2500  val 0.5000  lr 1.00e-04  grad 2.000  10.0 img/s  eta "
    )
    assert done == "done"


def test_silent_progress(capsys):
    progress = Progress(total_steps=20, start=0, enabled=False)
    progress.advance(1)
    progress.row({"step": 1} | ROW)
    progress.say("x")
    progress.close()
    assert capsys.readouterr().out == ""


def test_durations():
    assert [format_duration(s) for s in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


def test_rows_are_plain_json(tmp_path):
    write(tmp_path, 0, [1])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1} | ROW
