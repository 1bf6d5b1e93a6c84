"""A sharded checkpoint is resumed by any ranks and any stage, survives a killed rank, and becomes one file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastmim.cli import main
from fastmim.engine.checkpoint import convert
from fastmim.engine.checkpoint.shards import WEIGHT, Piece, Shards, write_shard

pytest.importorskip("deepspeed")

CUT = {
    "efficiency__deepspeed": "{zero_optimization: {reduce_bucket_size: 5000, stage3_prefetch_bucket_size: 1000, "
    "stage3_param_persistence_threshold: 0}}"
}
STAGE3 = dict(efficiency__zero_stage=3, train__save_every=5, train__keep=9, **CUT)
# Validation and a picture need all ranks under ZeRO-3, and 22 held-out images give two ranks unequal shares.
SHOWN = dict(output__pictures=2, train__val_every=10)

RESUMED = {
    1: {"plain": {}, "stage1": dict(efficiency__zero_stage=1), "stage3": dict(efficiency__zero_stage=3, **CUT)},
    4: {"stage1": dict(efficiency__zero_stage=1), "stage3": dict(efficiency__zero_stage=3, **CUT)},
}


@pytest.fixture(scope="module")
def saved(zero_run, launch, pictures, tmp_path_factory):
    """Two ranks at stage 3, ten steps with a checkpoint at the fifth; and a bf16 run."""
    folder = tmp_path_factory.mktemp("saved")
    whole = STAGE3 | SHOWN | {"data__val_path": pictures}
    launch([zero_run(folder / "whole", 2, **whole)], 2)
    return folder / "whole"


@pytest.fixture(scope="module")
def resumed(zero_run, launch, saved, tmp_path_factory):
    """The second half of the run on other ranks and stages."""
    folder = tmp_path_factory.mktemp("resumed")
    for ranks, runs in RESUMED.items():
        described = []
        for name, changes in runs.items():
            out = folder / f"{name} on {ranks}"
            give(saved, out)
            described.append(zero_run(out, ranks, **changes))
        launch(described, ranks)
    return folder


def give(saved, out, step=5):
    """A run folder as it was at a checkpoint."""
    shutil.copytree(saved / f"checkpoints/step-{step:08d}", out / f"checkpoints/step-{step:08d}")
    rows = (saved / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:step]))


def losses(folder):
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def same_end(folder, saved):
    assert len(losses(folder)) == 10
    torch.testing.assert_close(losses(folder), losses(saved), rtol=1e-5, atol=0)
    found, expected = (load_file(path / "encoder.safetensors") for path in (folder, saved))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [f"{name} on {ranks}" for ranks, runs in RESUMED.items() for name in runs])
def test_resumes_on_other_ranks_and_stages(name, resumed, saved):
    same_end(resumed / name, saved)


def test_every_rank_writes_its_share(saved):
    folder = saved / "checkpoints/step-00000005"
    sizes = [path.stat().st_size for path in sorted(folder.glob("shard-*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)
    assert not list(folder.parent.glob(".partial-*"))


def test_outputs_that_need_all_ranks(saved):
    assert (saved / "reconstructions/step-00000010.png").is_file()
    row = json.loads((saved / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.5 < row["val_loss"] < 1.2


def test_validation_is_that_of_one_process(saved, zero_run, launch, pictures, tmp_path):
    """Two ranks in step, with unequal shares, against one pass."""
    launch([zero_run(tmp_path / "one", 1, data__val_path=pictures)], 1)
    rows = [(path / "metrics.jsonl").read_text().splitlines()[-1] for path in (saved, tmp_path / "one")]
    found, expected = (json.loads(row)["val_loss"] for row in rows)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_killed_rank(zero_run, launch, saved, tmp_path):
    run = zero_run(tmp_path / "run", 2, **STAGE3)
    launch([run], 2, kill_in=8)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000005"]
    assert len(losses(tmp_path / "run")) == 7
    launch([run], 2)
    same_end(tmp_path / "run", saved)


def test_two_nodes_on_the_loopback(zero_run, launch, saved, tmp_path):
    launch([zero_run(tmp_path / "run", 2, efficiency__zero_stage=2)], 1, nodes=2)
    same_end(tmp_path / "run", saved)


def test_convert(saved, tmp_path, capsys):
    out = tmp_path / "new/encoder.safetensors"
    assert main(["convert", str(saved), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    torch.testing.assert_close(load_file(out), load_file(saved / "encoder.safetensors"), rtol=0, atol=0)
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["encoder"])["depths"] == [2, 1]
    whole = load_file(convert(saved / "checkpoints/step-00000010", tmp_path / "all.safetensors", whole=True))
    assert "head.weight" in whole and "encoder.mask_token" in whole
    assert torch.equal(whole["encoder.norm.weight"], load_file(out)["norm.weight"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda saved, tmp: (tmp, tmp / "x.safetensors"), "no complete checkpoint"),
        (lambda saved, tmp: (saved, tmp / "x.bin"), "must end in .safetensors"),
    ],
)
def test_convert_refuses(make, message, saved, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(*make(saved, tmp_path))


def test_a_lost_shard_is_named(saved, tmp_path):
    folder = tmp_path / "step-00000010"
    shutil.copytree(saved / "checkpoints/step-00000010", folder)
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors is missing"):
        convert(folder, tmp_path / "x.safetensors")


def test_pieces_are_found_by_position(tmp_path):
    """Seven elements in three pieces of two files, read across their borders."""
    values = torch.arange(7.0)
    shapes = {"a": (7,), "b": (2, 1)}
    write_shard(tmp_path, 0, [Piece("a", WEIGHT, 0, values[:3]), Piece("a", WEIGHT, 6, values[6:])], shapes)
    write_shard(tmp_path, 1, [Piece("a", WEIGHT, 3, values[3:6]), Piece("b", WEIGHT, 0, torch.ones(2))], shapes)
    shards = Shards(tmp_path)
    for start in range(7):
        for stop in range(start, 8):
            assert torch.equal(shards.read("a", WEIGHT, start, stop), values[start:stop])
    assert shards.tensor("b").shape == (2, 1)
    with pytest.raises(RuntimeError, match="missing"):
        shards.read("a", "exp_avg", 0, 1)
    cases = (({"a": (7,)}, "left over"), ({**shapes, "c": (1,)}, "missing"), ({**shapes, "b": (2,)}, "shape"))
    for wrong, message in cases:
        with pytest.raises(RuntimeError, match=message):
            shards.check(wrong)
