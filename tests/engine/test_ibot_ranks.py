"""iBOT on several ranks: teacher, frozen layer, clipping tensor by tensor and schedules as in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


from fastmim.engine.checkpoint import check_whole
from fastmim.engine.checkpoint.shards import STEP, WEIGHT, Shards
from tests.engine import ibot_worker

pytest.importorskip("deepspeed")

STEPS, EPOCH = ibot_worker.STEPS, ibot_worker.EPOCH
RUNS = {
    "ddp": {},
    "ddp in 4": dict(accum=4),
    "stage0": dict(stage=0),
    "stage0 in 4": dict(stage=0, accum=4),
    "stage1": dict(stage=1),
    "stage2": dict(stage=2),
    "stage2 in 4": dict(stage=2, accum=4),
    "stage2 offload": dict(stage=2, offload=True),
    "stage3": dict(stage=3),
    "stage3 in 4": dict(stage=3, accum=4),
    "stage3 persistent": dict(stage=3, persistent=True),
    "stage3 full": dict(stage=3, recompute="full"),
    "stage3 fc1": dict(stage=3, recompute="fc1"),
    "stage3 offload": dict(stage=3, offload=True),
}
OVERFLOWS = {f"stage{stage} overflow": dict(stage=stage, overflow_in=2) for stage in (1, 2, 3)}
SLOW = dict(precision="bf16", momentum=0.996, save_at=tuple(range(1, STEPS + 1)))
BF16 = {f"stage{stage} bf16": dict(stage=stage, **SLOW) for stage in (1, 2, 3)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in {"plain": {}, "overflow": dict(overflow_in=2)}.items():
        ibot_worker.train(folder / name, **changes)
    return folder


@pytest.fixture(scope="module")
def two(alone, launch, tmp_path_factory):
    """All runs on two ranks; and some that go on from one process or from two ranks, in the frozen epoch or after it."""
    folder = tmp_path_factory.mktemp("two")
    resumed = {
        "stage3 from one": dict(stage=3, resume=str(checkpoint(alone / "plain", 1))),
        "stage2 from one": dict(stage=2, resume=str(checkpoint(alone / "plain", 3))),
        "stage1 from stage3": dict(stage=1, resume=str(checkpoint(folder / "stage3", 1))),
        "ddp from stage2": dict(resume=str(checkpoint(folder / "stage2", 3))),
        "stage3 again": dict(stage=3, resume=str(checkpoint(folder / "stage3", 1))),
        "stage2 again": dict(stage=2, resume=str(checkpoint(folder / "stage2", 1))),
        "stage3 bf16 again": dict(stage=3, **SLOW, resume=str(checkpoint(folder / "stage3 bf16", 1))),
    }
    runs = RUNS | OVERFLOWS | BF16 | resumed
    launch([dict(out=str(folder / name), **changes) for name, changes in runs.items()], 2, worker="ibot_worker.py")
    return folder


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:08d}"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(run, step=STEPS):
    """Everything in a checkpoint: weights, teacher, centres, moments and counts of updates, by name and slot."""
    shards = Shards(checkpoint(run, step))
    found = {}
    for name, shape in shards.shapes.items():
        for slot in shards.slots(name):
            whole = slot == STEP
            found[f"{name}|{slot}"] = (
                torch.tensor(shards.scalar(name, slot)) if whole else shards.read(name, slot, 0, math.prod(shape))
            )
    return found


def same_run(run, other, rtol, atol, steps=STEPS):
    found, expected = rows(run), rows(other)[-steps:]
    for key in ("loss", "cls", "patch", "grad_norm"):
        pair = (torch.tensor([row[key] for row in part]) for part in (found, expected))
        torch.testing.assert_close(*pair, rtol=rtol, atol=0)
    torch.testing.assert_close(stored(run), stored(other), rtol=0, atol=atol)


# Only the order of sums differs. Measured: losses 5e-7, weights, teacher and moments 1e-6.
@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process(name, two, alone):
    same_run(two / name, alone / "plain", rtol=1e-5, atol=1e-5)


def test_recomputation_changes_no_bit(two):
    for name in ("stage3 full", "stage3 fc1"):
        same_run(two / name, two / "stage3", rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, steps", [("stage3 from one", 5), ("stage2 from one", 3), ("stage1 from stage3", 5), ("ddp from stage2", 3)]
)
def test_goes_on_from_other_ranks_and_engines(name, steps, two, alone):
    same_run(two / name, alone / "plain", rtol=1e-5, atol=1e-5, steps=steps)


def test_one_process_goes_on_from_two_ranks(two, alone, tmp_path):
    for stage, step in ((3, 1), (2, 3), (0, 3)):
        run = tmp_path / str(stage)
        ibot_worker.train(run, resume=checkpoint(two / f"stage{stage}", step))
        same_run(run, alone / "plain", rtol=1e-5, atol=1e-5, steps=STEPS - step)


@pytest.mark.parametrize("name", ["stage2", "stage3", "stage3 bf16"])
def test_going_on_on_the_same_ranks_changes_no_bit(name, two):
    same_run(two / f"{name} again", two / name, rtol=0, atol=0, steps=5)


def test_a_rank_killed_inside_an_update(launch, two, tmp_path):
    """When the student has moved and the teacher has not."""
    run = dict(out=str(tmp_path / "run"), stage=3)
    launch([run], 2, kill_in=5, worker="ibot_worker.py")
    kept = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert sorted(kept) == ["step-00000001", "step-00000003"]
    last = str(checkpoint(tmp_path / "run", 3))
    launch([dict(out=str(tmp_path / "again"), stage=3, resume=last)], 2, worker="ibot_worker.py")
    same_run(tmp_path / "again", two / "stage3", rtol=0, atol=0, steps=3)


@pytest.mark.parametrize("name", [*RUNS, *BF16])
def test_the_forward_pass_reads_the_average(name, two):
    read, held = load_file(two / name / "teacher.safetensors"), stored(two / name)
    expected = {key: held[f"teacher.{key}|{WEIGHT}"].view_as(value).to(value.dtype) for key, value in read.items()}
    torch.testing.assert_close(read, expected, rtol=0, atol=0)
    moved = [key for key in read if not torch.equal(held[f"teacher.{key}|{WEIGHT}"], held[f"{key}|{WEIGHT}"])]
    assert set(read) - set(moved) == {"head.last_layer.weight_g"}  # what is not trained


@pytest.mark.parametrize("name", ["ddp", "stage0", "stage1", "stage2", "stage3", "stage2 offload", "stage1 bf16"])
def test_a_frozen_layer_is_left_out(name, two):
    frozen = "head.last_layer.weight_v"
    folder = checkpoint(two / name, 1)
    check_whole(folder)
    early, late = stored(two / name, 1), stored(two / name)
    start = ibot_worker.new_objective().head.last_layer.weight_v
    rounded = start.bfloat16().float() if "bf16" in name else start
    assert torch.equal(early[f"{frozen}|{WEIGHT}"], rounded.flatten())
    assert f"{frozen}|exp_avg" not in early and early.get(f"{frozen}|{STEP}", 0) == 0
    assert late[f"{frozen}|{STEP}"] == STEPS - EPOCH
    assert late[f"encoder.norm.weight|{STEP}"] == STEPS
    assert not torch.equal(late[f"{frozen}|{WEIGHT}"], early[f"{frozen}|{WEIGHT}"])


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_skips_weights_teacher_and_centres(name, two, alone):
    same = {key: value for key, value in stored(two / name).items()}
    torch.testing.assert_close(same, stored(alone / "overflow"), rtol=0, atol=1e-5)
    losses = (torch.tensor([row["loss"] for row in rows(run)]) for run in (two / name, alone / "overflow"))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    # Step 3, which was skipped, is not one of the optimiser's; and it left nothing behind.
    assert stored(two / name)[f"encoder.norm.weight|{STEP}"] == STEPS - 1
