"""Rows on disk, the clock, the progress lines."""

from __future__ import annotations

import json
import re
import time

import pytest

from fastmim.engine.loggers import LOGGERS
from fastmim.engine.metrics import Metrics, StepClock, peak_memory, read_rows
from fastmim.engine.progress import Progress, format_duration, format_row

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
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 10/20  loss 1.2500  val 0.5000  lr 1.00e-04  10 img/s", line)
    assert done == "done"


@pytest.mark.parametrize("columns", [None, 40, 80])
def test_a_list_breaks_between_words_on_a_terminal_alone(columns, capsys, monkeypatch):
    if columns is not None:
        monkeypatch.setenv("FORCE_COLOR", "1"), monkeypatch.setenv("COLUMNS", str(columns))
    text = "/images/a file.tif: no range is defined for 32-bit samples (float32); give data.value_range=[low, high]"
    progress = Progress(total_steps=20, start=0, enabled=True)
    progress.item(text)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(line.strip() for line in lines) == text and lines[0].startswith("  /images")
    if columns is None:
        assert len(lines) == 1
    else:
        assert max(map(len, lines)) < columns and all(line.startswith(" " * 6) for line in lines[1:])


@pytest.mark.parametrize("wide", [
    {"step": 7}, {"step": 123_456}, {"step": 123_456, "val_loss": 0.5}, {"step": 99_999, "images_per_sec": 123_456.7},
])  # fmt: skip
def test_a_row_fits_into_80_columns(wide):
    """What gives way are numbers that metrics.jsonl has too; the step, the loss and the time left stay."""
    text = format_row(ROW | wide, 125_000 if wide["step"] > 7 else 300, eta="123:45:06", width=71)
    assert len(text) <= 71 and f"step {wide['step']}/" in text and "loss 1.2500" in text
    assert text.endswith("eta 123:45:06")
    assert "epoch 0.50  loss 1.2500  lr 1.00e-04  grad 2  " in format_row(ROW | {"step": 7}, 300, eta="1", width=200)


def test_the_end_is_foretold_once(capsys, monkeypatch):
    """After the second row: before it nothing is known, and the first step also starts everything."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(total_steps=100, start=0, enabled=True)
    for step, seconds in ((1, 50), (10, 9), (20, 10)):
        now[0] += seconds
        progress.row({"step": step} | ROW)
    first, second, foretold, third = capsys.readouterr().out.splitlines()
    assert "eta" not in first and second.endswith("eta 0:01:30") and third.endswith("eta 0:01:20")
    assert " about 0:01:30 for the 90 steps left, until " in foretold


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
