"""Runs that earlier code has written load and go on as that code went on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastmim.config import load_config
from fastmim.engine.train import train

WRITTEN = Path(__file__).parent / "old_checkpoints"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_end(found: Path, written: Path) -> None:
    """Losses, rates and norms of the steps after the checkpoint, and the encoder at the end.

    Processors add up in different orders: what is compared is far below the change of a step.
    """
    rows, wanted = lines(found / "metrics.jsonl"), lines(written / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4]
    for row, old in zip(rows, wanted[2:], strict=True):
        for key in ("loss", "lr", "grad_norm"):
            assert row[key] == pytest.approx(old[key], rel=2e-4), (row["step"], key)
        assert row["loss"] == pytest.approx(old["loss"], rel=1e-5)
    encoder, old_encoder = (load_file(folder / "encoder.safetensors") for folder in (found, written))
    assert encoder.keys() == old_encoder.keys()
    for name, tensor in encoder.items():
        torch.testing.assert_close(tensor, old_encoder[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_run_on_one_process_goes_on(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(WRITTEN / "local" / "checkpoints", run / "checkpoints")
    train(load_config(WRITTEN / "local" / "config.yaml", [f"output.dir={run}"]))
    same_end(run, WRITTEN / "local")


def test_a_run_under_zero_goes_on(tmp_path, launch):
    run = tmp_path / "run"
    shutil.copytree(WRITTEN / "zero" / "checkpoints", run / "checkpoints")
    sections = yaml.safe_load((WRITTEN / "zero" / "config.yaml").read_text())
    keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    keys["output.dir"] = str(run)
    launch([[f"{key}={json.dumps(value)}" for key, value in keys.items()]], 2)
    same_end(run, WRITTEN / "zero")


def test_an_engine_without_deepspeed_reads_the_shards(tmp_path):
    """A run that has no step left: what it exports is what the shards hold, put together here by hand."""
    run = tmp_path / "run"
    shutil.copytree(WRITTEN / "zero" / "checkpoints", run / "checkpoints")
    changes = ["efficiency.zero_stage=null", "train.micro_batch_size=4", "train.steps=2"]
    train(load_config(WRITTEN / "zero" / "config.yaml", [f"output.dir={run}", *changes]))
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in (WRITTEN / "zero" / "checkpoints").glob("*/shard-*.safetensors"):
        for key, tensor in load_file(path).items():
            name, slot, start = key.split("|")
            if slot == "weight":
                pieces.setdefault(name, []).append((int(start), tensor))
    for name, tensor in load_file(run / "encoder.safetensors").items():
        flat = torch.cat([part for _, part in sorted(pieces[f"encoder.{name}"], key=lambda piece: piece[0])])
        assert torch.equal(flat.view_as(tensor), tensor), name
