"""A whole run on each source and loader: the loader changes pixels by rounding only, and a restart nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from fastmim.data import pack_images, pool, source
from fastmim.data.scan import scan_folder
from fastmim.data.source import FileIndex
from fastmim.engine.train import train


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_shards_train_as_the_folder_they_were_packed_from(settings, pictures, tmp_path):
    pack_images(pictures, tmp_path / "shards", shard_bytes=20_000)
    train(settings(tmp_path / "a", train__steps=4, data__num_workers=0))
    train(settings(tmp_path / "b", train__steps=4, data__num_workers=0, data__path=tmp_path / "shards"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_dali_trains_and_goes_on_bit_for_bit(settings, pictures, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    pack_images(pictures, tmp_path / "shards", shard_bytes=20_000)
    options = dict(data__path=tmp_path / "shards", data__loader="dali", data__num_workers=1, optim__schedule="constant")
    whole = train(settings(tmp_path / "whole", train__steps=9, **options))
    train(settings(tmp_path / "parts", train__steps=4, **options))
    parts = train(settings(tmp_path / "parts", train__steps=9, **options))
    one, other = load_file(whole.encoder_path), load_file(parts.encoder_path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # another filter at the edges of the crop: the curve is that of the torchvision loader up to rounding
    train(settings(tmp_path / "torchvision", train__steps=4, **options | {"data__loader": "torchvision"}))
    ours = losses(tmp_path / "whole")[:4]
    assert ours == pytest.approx(losses(tmp_path / "torchvision"), rel=0.02)


def test_held_out_images_are_a_part_of_the_run(settings, pictures, tmp_path):
    """Validated on, never trained on, and the same after a restart, which another share refuses."""
    options = dict(data__val_fraction=0.3, data__num_workers=0, train__val_every=2, train__log_every=2)
    whole = train(settings(tmp_path / "whole", train__steps=4, **options))
    train(settings(tmp_path / "parts", train__steps=2, optim__schedule="constant", **options))
    with pytest.raises(ValueError, match=r"data.val_fraction=0.2 \(checkpoint: 0.3\).* may never change"):
        train(settings(tmp_path / "parts", train__steps=4, **options | {"data__val_fraction": 0.2}))
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4] and whole.val_loss > 0
    train(settings(tmp_path / "all", train__steps=4, data__num_workers=0))
    assert losses(tmp_path / "all")[-1] != rows[-1]["loss"]  # others were trained on


@pytest.mark.parametrize("held_out", ["fraction", "path"])
def test_a_folder_is_listed_once(held_out, settings, pictures, tmp_path, monkeypatch):
    """By training, validation and pictures together: on a network drive a listing may take minutes."""
    listed = []
    monkeypatch.setattr(source, "scan_folder", lambda *asked: listed.append(asked[:2]) or scan_folder(*asked))
    other = tmp_path / "others"
    shutil.copytree(pictures, other)
    given = dict(data__val_fraction=0.3) if held_out == "fraction" else dict(data__val_path=other)
    options = dict(data__num_workers=0, train__val_every=2, output__pictures=2)
    result = train(settings(tmp_path / "run", train__steps=2, **options, **given))
    expected = [(str(pictures), "data.path")] + [(str(other), "data.val_path")] * (held_out == "path")
    assert listed == expected and result.val_loss is not None and result.picture_path is not None


def test_synthetic_images_need_no_folder(settings, tmp_path):
    result = train(settings(tmp_path, train__steps=2, data__path=None, data__loader="synthetic", output__pictures=2))
    assert len(losses(tmp_path)) == 2 and not result.bad_files


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_run_that_waits_for_data_is_saved_when_it_is_to_stop(settings, tmp_path, monkeypatch, number):
    # a network file system that hangs: the reads of the third step never come back
    monkeypatch.setattr(pool, "_PATIENCE", 0.1)
    trainer, read, reads = os.getpid(), FileIndex.read, []

    def hanging(index, i):
        reads.append(i)
        if len(reads) > 2 * options["train__micro_batch_size"]:
            os.kill(trainer, number)
            time.sleep(1000)
        return read(index, i)

    options = dict(data__num_workers=1, data__verify="none", output__pictures=0, train__micro_batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr("fastmim.data.build.survey", lambda *_args, **_options: [])  # it reads before training
        patch.setattr(FileIndex, "read", hanging)
        result = train(settings(tmp_path / "run", train__steps=6, train__grad_accum_steps=1, **options))
    assert result.interrupted and result.steps <= 2
    resumed = train(settings(tmp_path / "run", train__steps=6, train__grad_accum_steps=1, **options))
    assert resumed.steps == 6 and not resumed.bad_files


def test_a_file_that_crashes_its_decoder_is_named_and_the_run_goes_on(settings, tmp_path, monkeypatch):
    read = FileIndex.read

    def deadly(index, i):
        if i == 3:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(index, i)

    monkeypatch.setattr(FileIndex, "read", deadly)
    result = train(settings(tmp_path, train__steps=12, data__num_workers=2, data__verify="none", output__pictures=0))
    assert result.steps == 12 and list(result.bad_files.values()) == ["its decoder crashed (SIGSEGV)"]
    assert json.loads((tmp_path / "bad_files.json").read_text()) == result.bad_files
