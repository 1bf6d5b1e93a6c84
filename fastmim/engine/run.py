"""What is due after a step (metrics, validation, picture, checkpoint), and the end of a run."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim._version import __version__
from fastmim.engine import distributed
from fastmim.engine.accuracy import Accuracy
from fastmim.engine.base import Engine
from fastmim.engine.checkpoint import export, save_checkpoint
from fastmim.engine.distributed import World
from fastmim.engine.metrics import Metrics, StepClock, peak_memory, read_rows
from fastmim.engine.progress import Progress, clock
from fastmim.engine.result import TrainResult
from fastmim.evaluate.curve import save_curve
from fastmim.evaluate.reconstruct import save_picture
from fastmim.evaluate.validation import validation_loss
from fastmim.files import write_text
from fastmim.wording import plural

_NAMED_BAD_FILES = 50


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Steps between events; 0: at the end only. ``seconds``: a row is due after so many too; 0: by steps alone."""

    log: int
    seconds: float = 0
    save: int = 0
    validate: int = 0
    picture: int = 0
    probe: int = 0


class LostFolderError(FileNotFoundError, RuntimeError):
    """``output.dir`` was deleted or moved while the run wrote there: the run failed, nothing wrong was asked for."""


class Run:
    """The outputs of a run. Every rank has one; rank 0 writes and talks.

    Args:
        folder: ``output.dir``.
        engine: gives losses, and is what checkpoints hold.
        world: this process.
        start, total: steps already done, and the length of the run.
        global_batch_size: to count images.
        every: when something is due.
        keep: checkpoints that stay.
        stored: JSON values kept in every checkpoint.
        loader: the training images, for the length of an epoch and the files that could not be used.
        val_loader: held-out images, or None.
        val_batches: micro-batches of a validation; None: all.
        probe: measures the features of the encoder, on every rank, or None.
        classes: names, where the objective learns them.
        picture_batch: (images, sample_ids) to draw, or None.
        loggers: where numbers and pictures go beside ``metrics.jsonl``, by name.
        settings: every key of the config, for them.
        encoder: keyword arguments that built the encoder, noted in the exported files.
        statistics: of :func:`~fastmim.engine.settings.image_facts`, noted there too.
    """

    def __init__(
        self,
        *,
        folder: Path,
        engine: Engine,
        world: World,
        start: int,
        total: int,
        global_batch_size: int,
        every: Intervals,
        keep: int,
        stored: Mapping[str, Any],
        loader: Any,
        val_loader: Any = None,
        val_batches: int | None = None,
        probe: Callable[[], dict[str, float]] | None = None,
        classes: Sequence[str] = (),
        picture_batch: tuple[Tensor, Tensor] | None = None,
        loggers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        encoder: dict[str, Any],
        statistics: dict[str, Any],
    ) -> None:
        self.folder, self.engine, self.world, self.total = folder, engine, world, total
        self.global_batch_size, self.every, self.keep, self.stored = global_batch_size, every, keep, stored
        self.loader, self.val_loader, self.val_batches = loader, val_loader, val_batches
        self.picture_batch, self.probe = picture_batch, probe
        self.said: dict[str, Any] = {"encoder": encoder, "statistics": statistics}
        how: dict[str, Any] = {"start": start, "said": self.said, "main": world.is_main}
        self.accuracy = Accuracy(engine.objective, folder, classes, **how) if classes else None
        self.progress = Progress(total_steps=total, start=start, enabled=world.is_main)
        enabled = world.is_main
        self.metrics = Metrics(folder, start=start, loggers=loggers, settings=settings or {}, enabled=enabled)
        self.clock = StepClock()  # opening a logger is no training
        self._first, self._logged = start + 1, start
        self._shown_at, self._asked = time.monotonic(), False
        #: Agreed among the ranks: the next step is shown, because the last row is long ago.
        self.row_wanted = False
        #: The signal that all ranks stop for.
        self.stopped_by = 0
        self.lost = False
        self._home = os.open(folder, os.O_RDONLY) if world.is_main else None
        self._last: dict[str, Any] = (read_rows(folder / "metrics.jsonl") or [{}])[-1] if start else {}

    def begin(self, banner: Sequence[tuple[str, str]]) -> None:
        """Say what is about to be trained; ``banner``: names and values."""
        self.progress.say(f"{clock()} fastmim {__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
        self.progress.table(banner)
        self.progress.begin()
        self._shown_at = time.monotonic()

    def after_step(self, step: int, lr: float) -> None:
        """Do what is due once ``step`` updates are done; ``lr`` was the rate of the last one.

        Raises:
            NonFiniteError: found at a logged or saved step.
        """
        self.progress.advance(step)
        validate = self.val_loader is not None and self._due(self.every.validate, step)
        probe = self.probe is not None and self._due(self.every.probe, step)
        due = validate or probe or self._due(self.every.log, step)
        if due or self.row_wanted or step == self._first:
            self._log(step, lr, due, validate=validate, probe=probe)
        with self.clock.paused():
            if self._due(self.every.picture, step):
                self._picture(step)
            saved = self.save() if self._due(self.every.save, step) else None
            if self.accuracy is not None and validate:
                self.accuracy.keep_best(saved, self.save)

    def _due(self, every: int, step: int) -> bool:
        return step == self.total or (every > 0 and step % every == 0)

    def wants_row(self) -> bool:
        """Whether rank 0's clock asks for a row between those of ``every.log``; it asks once for each."""
        if self._asked or not self.every.seconds or not self.world.is_main:
            return False
        self._asked = time.monotonic() - self._shown_at >= self.every.seconds
        return self._asked

    def _log(self, step: int, lr: float, due: bool, *, validate: bool, probe: bool) -> None:
        """Write and show the row of a step.

        One that is not ``due`` is a look at the interval so far, which goes on: rows that are due stay what they
        would be without it. (The first step of a process is only shown: ``metrics.jsonl`` knows no restarts.)
        """
        means = self.engine.read(not due)
        steps = step - self._logged
        rates = self.clock.read(steps, steps * self.global_batch_size, not due)
        memory, kind = peak_memory()
        epoch = step / self.loader.steps_per_epoch
        row: dict[str, Any] = {"step": step, "epoch": epoch, "loss": means.pop("loss"), "lr": lr}
        row |= {**means, **rates, "peak_memory_gib": memory, "memory_kind": kind}
        if validate:
            with self.clock.paused():
                row |= self._validate()
        if probe and self.probe is not None:
            with self.clock.paused():
                row |= self.probe()
        self._look_for_folder()
        with self.clock.paused():
            if due or self.row_wanted:
                self.metrics.write(row)
        self.progress.row(row)
        self._shown_at, self._asked, self.row_wanted = time.monotonic(), False, False
        if due:
            self._logged, self._last = step, row

    def _look_for_folder(self) -> None:
        """Rank 0 notes that ``output.dir`` is no longer the folder that the run began to write in."""
        if self._home is not None and not self.lost:
            there = self.folder.is_dir() and os.path.samestat(self.folder.stat(), os.fstat(self._home))
            self.lost = not there

    def _validate(self) -> dict[str, float]:
        batches, autocast = self.val_loader.epoch(0), self.engine.autocast()
        how: dict[str, Any] = dict(max_batches=self.val_batches, autocast=autocast, collective=self.engine.collective)
        if self.accuracy is None:
            return {"val_loss": validation_loss(self.engine.objective, batches, **how)}
        return self.accuracy.validate(batches, **how)

    def picture_path(self, step: int) -> Path:
        """Where the picture of a step lies."""
        return self.folder / "reconstructions" / f"step-{step:08d}.png"

    def _picture(self, step: int) -> None:
        main = self.world.is_main
        if self.picture_batch is None:
            return
        objective: Any = self.engine.objective
        if part := objective.untrained():
            self.progress.say(f"no picture at step {step}: {part} has not been trained yet")
        elif main or self.engine.collective:
            path, autocast = self.picture_path(step), self.engine.autocast()
            drawn = save_picture(objective, *self.picture_batch, path, autocast=autocast, write=main)
            if drawn and main:
                self.metrics.picture("reconstructions", path, step)

    def save(self) -> Path:
        """Write a checkpoint of the current step; every rank calls it.

        Raises:
            LostFolderError: written, into an ``output.dir`` made anew, because the run's own was deleted or moved.
        """
        self._look_for_folder()
        root = self.folder / "checkpoints"
        path = save_checkpoint(root, self.engine, self.stored, keep=self.keep, world=self.world)
        if distributed.broadcast(self.lost):
            what = f"deleted or moved during the run; made anew with {path.name}, from which the next start goes on"
            raise LostFolderError(errno.ENOENT, what, f"output.dir={self.folder}")
        return path

    def interrupted(self) -> TrainResult:
        """Save the last finished step of a run that was asked to stop, and report; every rank calls it."""
        self.progress.close()
        self.engine.discard_step()
        path = self.save()
        result = self._result(checkpoint_path=path, interrupted=True, stopped_by=self.stopped_by)
        self._tell_bad_files(result.bad_files)
        by = f" by {signal.Signals(self.stopped_by).name}" if self.stopped_by else ""
        self.progress.say(f"{clock()} interrupted{by} at step {result.steps} of {self.total}")
        self.progress.table([
            ("saved in", str(path)),
            ("to go on", "the same command (train.resume=auto)"),
            ("encoder", f"fastmim convert {shlex.quote(str(self.folder))} encoder.safetensors"),
        ])  # fmt: skip
        return result

    def finish(self) -> TrainResult:
        """Write what is left at the end of a run and say where everything is; every rank calls it."""
        checkpoint = self.save()
        encoder, picture = self.folder / "encoder.safetensors", self.picture_path(self.total)
        curve = None
        if not distributed.broadcast(picture.exists()):
            self._picture(self.total)  # resumed at the very end
        if self.world.is_main:
            export(checkpoint, encoder, **self.said)
            if self.accuracy is not None:
                self.accuracy.export(checkpoint)
            curve = save_curve(read_rows(self.folder / "metrics.jsonl"), self.folder / "loss.png")
        distributed.barrier()
        result = self._result(
            encoder_path=encoder,
            picture_path=picture if distributed.broadcast(picture.exists()) else None,
            checkpoint_path=checkpoint,
            curve_path=distributed.broadcast(curve),
        )
        self._tell_bad_files(result.bad_files)
        self.progress.close()
        loss = f", loss {result.loss:.4f}" if result.loss is not None else ""
        val = f", validation {result.val_loss:.4f}" if result.val_loss is not None else ""
        for score, name in ((result.val_top1, "top-1"), (result.val_map, "mAP"), (result.ema_score, "of the average")):
            val += f", {name} {100 * score:.1f} %" if score is not None else ""
        knn = f", k-NN {result.knn_top1:.1f} %" if result.knn_top1 is not None else ""
        self.progress.say(f"{clock()} done: {plural(result.steps, 'step')}{loss}{val}{knn}")
        self.progress.table(result.places())
        return result

    def _result(self, **paths: Any) -> TrainResult:
        merged: dict[str, str] = {}
        for loader in (self.val_loader, self.loader):
            for files in distributed.gather(dict(loader.bad_files) if loader is not None else {}):
                merged |= files
        if self.world.is_main:
            text = json.dumps(merged, indent=1, ensure_ascii=False, sort_keys=True)
            path = self.folder / "bad_files.json"
            write_text(path, text + "\n")
        last = distributed.broadcast(self._last)
        return TrainResult(
            steps=self.engine.steps,
            loss=last.get("loss"),
            val_loss=last.get("val_loss"),
            val_top1=last.get("val_top1"),
            val_map=last.get("val_map"),
            ema_score=last.get("ema_val_top1", last.get("ema_val_map")),
            knn_top1=last.get("knn_top1"),
            output_dir=self.folder,
            images_seen=self.engine.steps * self.global_batch_size,
            bad_files=merged,
            **paths,
        )

    def _tell_bad_files(self, bad_files: dict[str, str]) -> None:
        if not bad_files:
            return
        listed = self.folder / "bad_files.json"
        self.progress.say(f"{plural(len(bad_files), 'file')} could not be used (listed in {listed}):")
        for path, reason in sorted(bad_files.items())[:_NAMED_BAD_FILES]:
            self.progress.item(f"{path}: {reason}".encode("utf-8", "backslashreplace").decode())
        if len(bad_files) > _NAMED_BAD_FILES:
            self.progress.item(f"… and {len(bad_files) - _NAMED_BAD_FILES} more")

    def close(self) -> None:
        """Close files and the live line."""
        self.progress.close()
        if self._home is not None:
            os.close(self._home)
        self.metrics.close()
