"""What the loggers of a run have written, read back through their own packages; nothing leaves the machine."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
from pathlib import Path

import pytest

from fastmim.config import load_config
from fastmim.engine.loggers import Loggers, RunFacts, check_loggers
from fastmim.engine.metrics import Metrics, read_rows
from fastmim.engine.train import train

ROW = {"epoch": 0.5, "loss": 1.25, "lr": 1e-4, "grad_norm": 2.0, "images_per_sec": 10.0, "data_time": 0.5,
       "peak_memory_gib": 3.0, "step_time": 0.25}  # fmt: skip
NAMES = {
    "schedule/epoch": "epoch", "loss/train": "loss", "schedule/lr": "lr", "gradient/norm": "grad_norm",
    "speed/images_per_second": "images_per_sec", "speed/data_time": "data_time", "memory/peak_gib": "peak_memory_gib",
    "speed/step_time": "step_time", "loss/val": "val_loss",
}  # fmt: skip
ALL = "[tensorboard, csv, wandb, mlflow]"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """As on a machine whose user has said nothing."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)


def write(folder, start, rows, *names):
    metrics = Metrics(folder, start=start, loggers=names, settings={"optim.lr": 0.1}, enabled=True)
    for row in rows:
        metrics.write(row)
    metrics.close()


@pytest.fixture(scope="module")
def resumed(zero_run, tmp_path_factory):
    """Four steps with every logger, of which the third and fourth belong to a second process' life."""
    out = tmp_path_factory.mktemp("loggers") / "run"
    with pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
            patched.delenv(name)
        shown = dict(output__pictures=1, output__loggers=ALL)
        train(load_config(None, zero_run(out, 1, train__steps=2, **shown)))
        before = json.loads((out / "loggers.json").read_text())
        train(load_config(None, zero_run(out, 1, train__steps=4, train__resume_changes="allow", **shown)))
    assert json.loads((out / "loggers.json").read_text()) == before and before.keys() == {"wandb", "mlflow"}
    return out


def expected(out):
    """(step, name) → value, from metrics.jsonl by the table above."""
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    return {(row["step"], name): row[key] for row in rows for name, key in NAMES.items() if key in row}


def test_tensorboard(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = {(one.step, name): one.value for name in tags["scalars"] for one in events.Scalars(name)}
    assert found == pytest.approx(expected(resumed), rel=1e-6)
    assert [image.step for image in events.Images("reconstructions")] == [2, 4]
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.embed_dim" in hparams


def test_csv(resumed):
    with (resumed / "metrics.csv").open(newline="") as file:
        columns, *rows = csv.reader(file)
    found = {(int(row[0]), name): float(x) for row in rows for name, x in zip(columns[1:], row[1:], strict=True)}
    assert found == expected(resumed)


def test_mlflow(resumed):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{resumed / 'mlflow/mlflow.db'}")
    experiment = client.get_experiment_by_name("fastmim")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((resumed / "loggers.json").read_text())["mlflow"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    history = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
    assert {(one.step, one.key): one.value for metric in history for one in metric} == expected(resumed)
    assert run.data.params["model.embed_dim"] == "8" and run.data.params["train.steps"] == "2"
    assert run.data.tags["train.steps from step 2"] == "4"
    images = [one.path for one in client.list_artifacts(run.info.run_id, "images")]
    assert {path.split("+step+")[1].split("+")[0] for path in images if path.endswith(".png")} == {"2", "4"}
    assert list((resumed / "mlflow/artifacts").rglob("*.png"))


def wandb_records(path: Path):
    """Records of a .wandb file: LevelDB's log format (github.com/google/leveldb/blob/main/doc/log_format.md) behind
    seven bytes of its own, all in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, []
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


def test_wandb(resumed):
    files = sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    found, ids, settings, pictures = {}, set(), {}, []
    for record in (record for file in files for record in wandb_records(file)):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            settings |= {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.run.config.update}
        if record.HasField("history"):
            row = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
            pictures += [row["step"]] if "reconstructions" in row else []
            found |= {(row["step"], name): row[name] for name in NAMES if name in row}
    assert ids == {json.loads((resumed / "loggers.json").read_text())["wandb"]}
    assert found == pytest.approx(expected(resumed), rel=1e-12)
    assert pictures == [2, 4] and len(list((resumed / "wandb").rglob("*.png"))) == 2
    assert settings["model.embed_dim"] == 8


def test_no_process_stays(resumed):
    """wandb starts one of its own, which is told the process that it serves."""
    names = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            names.append(path.read_bytes().split(b"\0"))
        except OSError:  # it has just ended
            continue
    assert not [name for name in names if b"wandb-core" in name[0] and str(os.getpid()).encode() in name]


def test_columns_stay_where_they_are(tmp_path):
    """A held-out loss from the third step on, in this process and after a resumption from the second."""
    rows = [{"step": step} | ROW | ({"val_loss": 0.5, "extra": 7.0} if step > 2 else {}) for step in range(1, 5)]
    write(tmp_path, 0, rows, "csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0][0] == "step" and table[0][-2:] == ["loss/val", "objective/extra"]
    assert [row[-2:] for row in table[1:]] == [["", ""], ["", ""], ["0.5", "7.0"], ["0.5", "7.0"]]
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,0.")  # killed while writing
    write(tmp_path, 2, rows[2:3], "csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == table[:4]
    write(tmp_path, 0, [{"step": 1, "loss": 2.0}], "csv")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss/train", "1,2.0"]


def test_a_logger_that_comes_later_has_what_was_before(tmp_path):
    write(tmp_path, 0, [{"step": step} | ROW for step in (1, 2)])
    write(tmp_path, 2, [{"step": 3} | ROW], "csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [(row["step"], row["loss/train"]) for row in csv.DictReader(file)] == [(s, "1.25") for s in "123"]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_missing_tensorboard_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    check_loggers(["tensorboard"])
    write(tmp_path, 0, [{"step": 1} | ROW, {"step": 2} | ROW], "tensorboard")
    (text,) = warnings(caplog)
    assert "pip install tensorboard" in text and len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_a_full_disk_costs_a_logger_and_not_the_run(tmp_path, caplog):
    loggers = Loggers(["csv", "tensorboard"], RunFacts(tmp_path))
    table = loggers._open["csv"]
    table.scalars(1, {"loss/train": 1.0})
    table._file = open("/dev/full", "w")  # noqa: SIM115
    for step in (2, 3):
        loggers.scalars({"step": step, "loss": 2.0})
    loggers.close()
    assert warnings(caplog) == [f"output.loggers: csv: {tmp_path}/metrics.csv: no space left on device; "
                                "the run goes on without it"]  # fmt: skip
    assert list(loggers._open) == [] and list((tmp_path / "tensorboard").iterdir())


def test_a_server_that_is_not_there_costs_a_logger(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write(tmp_path, 0, [{"step": 1} | ROW, {"step": 2} | ROW], "mlflow")
    (text,) = warnings(caplog)
    assert text.startswith("output.loggers: mlflow: ") and "127.0.0.1" in text and text.endswith("goes on without it")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2 and not (tmp_path / "mlflow").exists()


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "alembic")])
def test_a_missing_package_is_said_before_anything_is_built(settings, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("fastmim.engine.train.build", None)
    with pytest.raises(ValueError, match=rf"output\.loggers: {name}: {package} is not installed; .*\[loggers\]"):
        train(settings(tmp_path / "run", output__loggers=[name]))
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """wandb leaves a folder of its own name where it writes."""
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb is not installed"):
        check_loggers(["wandb"])
    sys.modules.pop("wandb", None)
