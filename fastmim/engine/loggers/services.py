"""Loggers of services: Weights & Biases and MLflow. Without a word in the environment, both write to the disk alone."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmim.engine.loggers.base import Logger, RunFacts
from fastmim.errors import one_line

log = logging.getLogger("fastmim")

PROJECT = "fastmim"
_PARAMS_AT_ONCE = 100  # of one request to MLflow
_LONGEST = 500  # value of a parameter, in the older versions


class WandB(Logger):
    """A run of Weights & Biases in ``wandb/``; nothing is sent unless ``WANDB_MODE`` or ``WANDB_API_KEY`` is set.

    Rows have their step as a number of its own, because wandb drops what is logged for a step that it has had: after
    a resumption from an earlier checkpoint it holds some steps twice.
    """

    place = "wandb"
    packages = ("wandb",)

    @staticmethod
    def prepare() -> None:
        if _wandb_is_offline():
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

    def __init__(self, facts: RunFacts) -> None:
        import wandb

        known, offline = facts.run_id("wandb"), _wandb_is_offline()
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", facts.folder.resolve().name),
            dir=str(facts.folder),
            config=dict(facts.settings),
            allow_val_change=True,
            id=known,
            resume="allow" if known and not offline else None,
            mode="offline" if offline else None,
            reinit="create_new",  # a run of the script that calls train() stays its own
            settings=wandb.Settings(console="off", silent=True),
        )
        facts.keep_id("wandb", self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if offline:
            what = "wandb: nothing is sent (WANDB_MODE=online would); afterwards: wandb sync %s"
            log.info(what, self._run.settings.sync_dir)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, title: str, path: Path, step: int) -> None:
        self._run.log({"step": step, title: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()
        if self._wandb.run is None:  # nobody else in this process needs the process that wandb has started
            self._wandb.teardown()


def _wandb_is_offline() -> bool:
    return not (os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"))


class MLflow(Logger):
    """A run of MLflow where ``MLFLOW_TRACKING_URI`` says, else in ``mlflow/``: a SQLite file, and pictures beside it.

    After a resumption from an earlier checkpoint it holds some steps twice: MLflow deletes nothing.
    """

    place = "mlflow"
    packages = ("mlflow", "sqlalchemy", "alembic")

    @staticmethod
    def prepare() -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

    def __init__(self, facts: RunFacts) -> None:
        import mlflow

        self._entities: Any = mlflow.entities
        home = None if mlflow.is_tracking_uri_set() else facts.folder.resolve() / self.place
        if home is not None:
            home.mkdir(exist_ok=True)
        self._client: Any = mlflow.MlflowClient(None if home is None else f"sqlite:///{home / 'mlflow.db'}")
        self._run_id = self._found(facts.run_id("mlflow")) or self._created(facts, home)
        facts.keep_id("mlflow", self._run_id)
        self._note(facts)

    def _found(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            self._client.set_terminated(run_id, "RUNNING")
        except Exception as error:  # another server, or a folder that was cleaned
            log.warning("output.loggers: mlflow: a new run, because the old one is not there: %s", one_line(error))
            return None
        return run_id

    def _created(self, facts: RunFacts, home: Path | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        place = home and (home / "artifacts").as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, place)
        return str(self._client.create_run(number, run_name=facts.folder.resolve().name).info.run_id)

    def _note(self, facts: RunFacts) -> None:
        """The settings as parameters. These cannot change: what is another since a resumption becomes a tag."""
        texts = {key: str(value)[:_LONGEST] for key, value in facts.settings.items()}
        said = self._client.get_run(self._run_id).data.params
        new = [self._entities.Param(key, text) for key, text in texts.items() if key not in said]
        for begin in range(0, len(new), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=new[begin : begin + _PARAMS_AT_ONCE])
        for key, text in texts.items():
            if said.get(key, text) != text:
                self._client.set_tag(self._run_id, f"{key} from step {facts.start}", text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def picture(self, title: str, path: Path, step: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self._client.log_image(self._run_id, image, key=title, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
