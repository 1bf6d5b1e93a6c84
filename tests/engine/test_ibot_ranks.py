"""iBOT, MoCo v3 and others on several ranks: teacher, frozen layer, clipping, schedules, BatchNorm and the average of a
fine-tuning's weights as in one process."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmim.engine.checkpoint import check_whole
from fastmim.engine.checkpoint.shards import STEP, WEIGHT, Shards
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import param_groups
from fastmim.engine.zero import averages
from fastmim.engine.zero.fragments import Fragment
from fastmim.engine.zero.update import UpdateHooks
from fastmim.models import create_encoder
from fastmim.objectives.schedule import Schedule
from fastmim.plan.memory import LAYOUTS, states
from fastmim.plan.trace import Footprint, trace
from tests.engine import ibot_worker

pytest.importorskip("deepspeed")

STEPS, EPOCH = ibot_worker.STEPS, ibot_worker.EPOCH
RUNS = {
    "ddp": {},
    "ddp in 4": dict(accum=4),
    "stage0": dict(stage=0),
    "stage1": dict(stage=1),
    "stage2": dict(stage=2),
    "stage2 in 4": dict(stage=2, accum=4),
    "stage2 offload": dict(stage=2, offload=True),
    "stage3": dict(stage=3),
    "stage3 in 2": dict(stage=3, accum=2, persistent=True),
    "stage3 full": dict(stage=3, recompute="full"),
    "stage3 offload": dict(stage=3, offload=True),
    "ddp chunks": dict(crop_chunks=1),
    "stage2 chunks": dict(stage=2, accum=2, crop_chunks=2),
    "stage3 chunks": dict(stage=3, recompute="full", crop_chunks=2),
}
SWIN = dict(encoder="swin", own_heads=True)
"""With prototypes of their own for patches."""
OVERFLOWS = {f"stage{stage} overflow": dict(stage=stage, overflow_in=2) for stage in (2, 3)}
SLOW = dict(precision="bf16", momentum=0.996, save_at=tuple(range(1, STEPS + 1)))
BF16 = {f"stage{stage} bf16": dict(stage=stage, **SLOW) for stage in (1, 2, 3)}
MOCO = {
    f"moco {name}": dict(name="moco", **changes)
    for name, changes in {
        "ddp": {}, "stage1": dict(stage=1), "stage2 in 2": dict(stage=2, accum=2), "ddp in 2": dict(accum=2),
        "stage3": dict(stage=3), "stage3 full": dict(stage=3, recompute="full"), "stage1 bf16": dict(stage=1, **SLOW),
        "stage3 bf16": dict(stage=3, **SLOW),
    }.items()
}  # fmt: skip
MOCO_FROZEN = {f"momentum_encoder.encoder.{name}" for name in ("pos_embed", "patch_embed.proj.weight",
                                                               "patch_embed.proj.bias")}  # fmt: skip
BF16["stage3 bf16 chunks"] = dict(stage=3, crop_chunks=2, **SLOW)


# Other objectives; what they compute in two micro-batches or on two ranks is what they compute at once.
TOKENS = {
    "beit ddp in 4": dict(name="beit", accum=4),
    "beit stage1": dict(name="beit", stage=1),
    "beit stage2": dict(name="beit", stage=2),
    "beit stage3": dict(name="beit", stage=3, recompute="full"),
    "dvae ddp": dict(name="dvae"),
    "dvae stage0": dict(name="dvae", stage=0, accum=2),
    "dvae stage2": dict(name="dvae", stage=2),
    "dvae stage3": dict(name="dvae", stage=3),
}
TOKENS_BF16 = {
    f"{name} bf16": dict(name=name, stage=stage, precision="bf16") for name, stage in (("beit", 3), ("dvae", 2))
}
# The average of a classifier; the norm of all tokens is not trained.
AVERAGED = {
    "classify ddp in 2": dict(name="classify", accum=2),
    "classify stage1 bf16": dict(name="classify", stage=1, **SLOW),
    "classify stage2": dict(name="classify", stage=2),
    "classify stage3": dict(name="classify", stage=3, recompute="full"),
}
AVERAGED_FROZEN = {"average.encoder.norm.weight", "average.encoder.norm.bias"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer of every BEiT here."""
    path = tmp_path_factory.mktemp("tokenizer") / "encoder.safetensors"
    torch.manual_seed(1)
    model = create_encoder(ibot_worker.DVAE)
    save_file(model.state_dict(), path, {"encoder": json.dumps(model.settings)})
    return str(path)


def with_tokenizer(changes, path):
    return changes | (dict(tokenizer=path) if changes.get("name") == "beit" else {})


@pytest.fixture(scope="module")
def alone(tokenizer, tmp_path_factory):
    """One process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("beit", "dvae"):
        ibot_worker.train(folder / name, **with_tokenizer(dict(name=name), tokenizer))
    overflow = dict(overflow_in=2, save_at=(2, 3, STEPS))
    runs = {"plain": {}, "swin": SWIN, "overflow": overflow}
    runs |= {"moco": dict(name="moco"), "moco in 2": dict(name="moco", accum=2), "classify": dict(name="classify")}
    for name, changes in runs.items():
        ibot_worker.train(folder / name, **changes)
    return folder


@pytest.fixture(scope="module")
def killed(launch, tmp_path_factory):
    """A run of which a rank dies in step 4, when the student has moved and the teacher has not."""
    run = tmp_path_factory.mktemp("killed") / "run"
    launch([dict(out=str(run), stage=3)], 2, kill_in=4, worker="ibot_worker.py")
    return run


@pytest.fixture(scope="module")
def two(alone, killed, tokenizer, launch, tmp_path_factory):
    """All runs on two ranks, and some that go on from one process or from two, in the frozen epoch or after it."""
    folder = tmp_path_factory.mktemp("two")
    resumed = {
        "stage3 from one": dict(stage=3, resume=str(checkpoint(alone / "plain", 1))),
        "stage1 from stage3": dict(stage=1, resume=str(checkpoint(folder / "stage3", 1))),
        "stage3 again": dict(stage=3, resume=str(checkpoint(killed, 3))),
        "moco stage3 again": dict(name="moco", stage=3, resume=str(checkpoint(folder / "moco stage3", 3))),
        "moco stage2 from one": dict(name="moco", stage=2, resume=str(checkpoint(alone / "moco", 1))),
        "stage2 bf16 again": dict(stage=2, **SLOW, resume=str(checkpoint(folder / "stage2 bf16", 1))),
        "beit stage1 again": dict(name="beit", stage=1, resume=str(checkpoint(folder / "beit stage3", 3))),
        "classify stage3 again": dict(name="classify", stage=3, resume=str(checkpoint(folder / "classify stage3", 3))),
        "classify stage2 from one": dict(name="classify", stage=2, resume=str(checkpoint(alone / "classify", 1))),
        "dvae stage2 again": dict(name="dvae", stage=2, resume=str(checkpoint(folder / "dvae stage3", 3))),
    }
    resumed = {name: with_tokenizer(changes, tokenizer) for name, changes in resumed.items()}
    tokens = {name: with_tokenizer(changes, tokenizer) for name, changes in (TOKENS | TOKENS_BF16).items()}
    runs = RUNS | tokens | AVERAGED | {"swin": dict(stage=3, **SWIN)} | OVERFLOWS | BF16 | MOCO | resumed
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
            one = slot == STEP
            value = torch.tensor(shards.scalar(name, slot)) if one else shards.read(name, slot, 0, math.prod(shape))
            found[f"{name}|{slot}"] = value.float()
    return found


def same_run(run, other, tolerance, steps=STEPS):
    """Losses relative to themselves, norms of gradients ten times as far, and everything stored in absolute terms."""
    found, expected = rows(run), rows(other)[-steps:]
    assert len(found) == steps
    means = {"loss", "cls", "patch", "mse", "accuracy", "codes_used", "grad_norm"}  # the others are of a micro-batch
    for key in means & found[0].keys():
        factor = 10 if key == "grad_norm" else 1
        pair = (torch.tensor([row[key] for row in part]) for part in (found, expected))
        torch.testing.assert_close(*pair, rtol=factor * tolerance, atol=0)
    torch.testing.assert_close(stored(run), stored(other), rtol=0, atol=tolerance)


# Only the order of sums differs. Measured: losses 2e-7, norms 2e-6, centres 6e-8, weights 3e-8, teacher 8e-9.
@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process(name, two, alone):
    same_run(two / name, alone / "plain", 1e-6)


@pytest.mark.parametrize("name", [*TOKENS, "beit stage1 again", "dvae stage2 again"])
def test_beit_and_its_tokenizer_equal_one_process(name, two, alone):
    same_run(two / name, alone / name.split()[0], 1e-6, steps=3 if "again" in name else STEPS)


@pytest.mark.parametrize("name", TOKENS_BF16)
def test_tokens_in_bf16(name, two, alone):
    """The codes come from float32 weights all the same: the loss differs by the rounding of the encoder's alone."""
    for found, expected in zip(rows(two / name), rows(alone / name.split()[0]), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2)


def test_a_frozen_tokenizer_is_in_no_checkpoint(two, alone):
    for run in (two / "beit stage3", alone / "beit"):
        assert {key.partition(".")[0] for key in stored(run)} == {"encoder", "head"}


def test_swin_equals_one_process(two, alone):
    """Its first loss is larger, and the sums of windows are longer."""
    same_run(two / "swin", alone / "swin", 1e-5)


def test_recomputation_changes_no_bit(two):
    same_run(two / "stage3 full", two / "stage3", 0)
    same_run(two / "moco stage3 full", two / "moco stage3", 0)


# Statistics of BatchNorm and keys of two ranks are those of one with the same micro-batch over all ranks. Measured:
# losses 1e-6, norms 6e-6, everything stored 8e-7.
@pytest.mark.parametrize("name", [name for name in MOCO if "in 2" not in name and "bf16" not in name])
def test_moco_equals_one_process(name, two, alone):
    same_run(two / name, alone / "moco", 5e-6)


@pytest.mark.parametrize("name", ["moco ddp in 2", "moco stage2 in 2"])
def test_micro_batches_of_moco_equal_those_of_one_process(name, two, alone):
    """Their statistics are of four rows: from the fourth step on that has made 1e-4 of what sums differ by."""
    losses = [torch.tensor([row["loss"] for row in rows(run)[:3]]) for run in (two / name, alone / "moco in 2")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(stored(two / name, 3), stored(alone / "moco in 2", 3), rtol=0, atol=1e-5)


def test_a_micro_batch_of_moco_has_keys_of_its_own(alone):
    """By design: twice the accumulation is another loss, of half as many keys."""
    whole, halves = (rows(alone / name)[0]["loss"] for name in ("moco", "moco in 2"))
    assert abs(whole - halves) > 0.5


def test_moco_goes_on_with_the_same_bits_and_from_other_ranks(two, alone):
    same_run(two / "moco stage3 again", two / "moco stage3", 0, steps=3)
    same_run(two / "moco stage2 from one", alone / "moco", 5e-6, steps=5)


def test_moco_in_bf16_keeps_statistics_in_fp32(two, alone):
    same_run(two / "moco stage3 bf16", two / "moco stage1 bf16", 1e-5)
    run = two / "moco stage1 bf16"
    assert rows(run)[0]["loss"] == pytest.approx(rows(alone / "moco")[0]["loss"], rel=1e-2)
    low, full = stored(run, 1), stored(alone / "moco", 1)
    names = [name for name in full if ".running_" in name]
    assert len(names) == 2 * (3 + 2 + 3) and Shards(checkpoint(run, 1)).dtype("head.1.running_var") == torch.float32
    for name in names:
        torch.testing.assert_close(low[name], full[name], rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("name", [name for name in AVERAGED if "bf16" not in name])
def test_an_average_of_a_classifier_equals_that_of_one_process(name, two, alone):
    same_run(two / name, alone / "classify", 1e-6)


def test_an_average_goes_on_with_the_same_bits_and_from_other_ranks(two, alone):
    same_run(two / "classify stage3 again", two / "classify stage3", 0, steps=3)
    same_run(two / "classify stage2 from one", alone / "classify", 1e-6, steps=5)


@pytest.mark.parametrize("name", ["stage3 from one", "stage1 from stage3"])
def test_goes_on_from_other_ranks_and_stages(name, two, alone):
    same_run(two / name, alone / "plain", 1e-6, steps=5)


def test_one_process_goes_on_from_two_ranks(two, alone, tmp_path):
    for stage, step in ((3, 1), (2, 3), (0, 3)):
        run = tmp_path / str(stage)
        ibot_worker.train(run, resume=checkpoint(two / f"stage{stage}", step))
        same_run(run, alone / "plain", 1e-6, steps=STEPS - step)


def test_goes_on_after_a_kill_with_the_same_bits(two, killed):
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]
    same_run(two / "stage3 again", two / "stage3", 0, steps=3)


def test_goes_on_in_bf16_in_the_frozen_epoch_with_the_same_bits(two):
    same_run(two / "stage2 bf16 again", two / "stage2 bf16", 0, steps=5)


@pytest.mark.parametrize("name", [*RUNS, *BF16, *MOCO, *AVERAGED])
def test_the_forward_pass_reads_the_average(name, two):
    read, held = load_file(two / name / "teacher.safetensors"), stored(two / name)
    expected = {key: held[f"{key}|{WEIGHT}"].view_as(value).to(value.dtype) for key, value in read.items()}
    torch.testing.assert_close(read, expected, rtol=0, atol=0)
    students = {key: held[f"{key.partition('.')[2]}|{WEIGHT}"] for key in read}
    still = {key for key in read if torch.equal(held[f"{key}|{WEIGHT}"], students[key])}
    untrained = AVERAGED_FROZEN if name in AVERAGED else {"teacher.head.last_layer.weight_g"}
    assert still == (MOCO_FROZEN if name in MOCO else untrained)


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
    torch.testing.assert_close(stored(two / name), stored(alone / "overflow"), rtol=0, atol=1e-6)
    losses = (torch.tensor([row["loss"] for row in rows(run)]) for run in (two / name, alone / "overflow"))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_skipped_update_leaves_nothing_behind(alone, tmp_path):
    """Not in what is stored, and not in the sums for the centres: a run from that checkpoint begins without any."""
    before, after = stored(alone / "overflow", 2), stored(alone / "overflow", 3)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    ibot_worker.train(tmp_path / "run", resume=checkpoint(alone / "overflow", 3))
    same_run(tmp_path / "run", alone / "overflow", 0, steps=3)


@pytest.mark.parametrize("name", BF16)
def test_an_average_of_bf16_weights_moves(name, two):
    """With m = 0.996 it follows the fp32 weights in double precision; kept in bf16 it stands still."""
    momentum = Schedule(name="cosine", base_lr=0.996, min_lr=1.0, total_steps=STEPS)
    key = "encoder.blocks.0.attn.qkv.weight"
    exact = ibot_worker.new_objective().get_parameter(key).flatten().detach().bfloat16().double()
    start, low = exact.clone(), exact.bfloat16()
    for step in range(STEPS):
        student = stored(two / name, step + 1)[f"{key}|{WEIGHT}"]
        exact = momentum(step) * exact + (1 - momentum(step)) * student.double()
        low.lerp_(student.bfloat16(), 1 - momentum(step))
    found = stored(two / name)[f"teacher.{key}|{WEIGHT}"].double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)
    way = (exact - start).norm()
    assert (found - exact).norm() < 1e-2 * way
    assert (low.double() - exact).norm() > 0.5 * way


def test_bf16_of_every_stage(two, alone):
    """The first loss is that of the same weights with 8 bits; afterwards all stages go the same way, but for a
    weight that lies between two bf16 numbers. Groups of crops add up gradients, rounded to bf16, in another order."""
    for name in BF16:
        assert rows(two / name)[0]["loss"] == pytest.approx(rows(alone / "plain")[0]["loss"], rel=1e-2)
        same_run(two / name, two / "stage1 bf16", 1e-2 if "chunks" in name else 1e-3)


def test_groups_of_their_own_change_no_bit(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(ibot_worker, "param_groups", lambda objective, decay: objective.groups(decay, "parity"))
    ibot_worker.train(tmp_path / "run")
    same_run(tmp_path / "run", alone / "plain", 0)


HELD = {name: RUNS[name] for name in ("stage1", "stage2", "stage3", "stage2 offload")} | {"swin": dict(stage=3, **SWIN)}
HELD |= {name: BF16[name] for name in ("stage2 bf16", "stage3 bf16")}
HELD |= {name: MOCO[name] for name in ("moco stage1", "moco stage2 in 2", "moco stage3", "moco stage3 bf16")}


@pytest.mark.parametrize("name", HELD)
def test_what_a_rank_holds_is_what_the_planner_counts(name, two):
    """Three fp32 values a trained one (the moments and the average) and its master, half of them on each rank."""
    run, precision = HELD[name], "bf16" if "bf16" in name else "fp32"
    make = {key: run[key] for key in ("name", "encoder", "own_heads") if key in run}
    footprint, stage, offload = planned(**make), run["stage"], "optimizer" if "offload" in name else "none"
    still, bytes_ = footprint.parameters - footprint.trained, LAYOUTS[precision][0]
    found = states(footprint.trained, stage, 2, offload, LAYOUTS[precision], still=still, averaged=footprint.averaged)
    optimizer = found.host - 4 * footprint.trained / 2 if "offload" in name else found.optimizer
    padding = 4 * 4 * 4 * len(list(ibot_worker.new_objective(**make).parameters()))
    for rank in range(2):
        held = json.loads((two / name / f"held-{rank}.json").read_text())
        assert optimizer <= held["master"] + held["moments"] <= optimizer + padding
        assert found.weights <= held["weights"] <= found.weights + bytes_ * padding


def test_a_process_alone_holds_a_teacher_of_4_bytes_a_weight():
    """Its slot is its weight; it has neither gradients nor moments."""
    objective = ibot_worker.new_objective()
    engine = LocalEngine(objective, torch.optim.AdamW(param_groups(objective, 0.04)))
    images, mask = ibot_worker.batch_of(0)
    objective.set_step(EPOCH, STEPS, EPOCH)
    loss = engine(images, mask)["loss"]
    engine.backward(loss)
    size = {"weights": 4 * sum(p.numel() for p in objective.parameters())}
    size["gradients"] = 4 * sum(p.grad.numel() for p in objective.parameters() if p.grad is not None)
    engine.step()
    held = [value for state in engine.optimizer.state.values() for key, value in state.items() if key != "step"]
    size["optimizer"] = 4 * sum(value.numel() for value in held)
    footprint = planned()
    still, averaged = footprint.parameters - footprint.trained, footprint.averaged
    found = states(footprint.trained, 0, 1, still=still, averaged=averaged)
    assert size == {name: getattr(found, name) for name in size}


@cache
def planned(**make):
    """The planner's footprint of the worker's objective."""
    return Footprint(*trace(partial(ibot_worker.new_objective, **make), (2, 4), precision="fp32", on_gpu=False))


def test_a_freezable_layer_is_a_group_of_its_own():
    groups = param_groups(ibot_worker.new_objective(), 0.04)
    assert [group["name"] for group in groups] == ["decay", "decay:freezable", "no_decay"]
    assert groups[1]["param_names"] == ["head.last_layer.weight_v"] and groups[1]["weight_decay"] == 0.04
    assert all(len(group["params"]) == len(group["param_names"]) for group in groups)


def hooks(frozen, clip_each=None):
    """On two parameters of one group and one of another, whole."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for size, param in enumerate(params):
        param.grad = torch.full((3,), 10.0**size)
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0)
    pieces = [Fragment(str(i), 0, 3, param, param, 0) for i, param in enumerate(params)]
    how = dict(clip_each=clip_each, whole=True, device=torch.device("cpu"))
    chosen = [params[i] for i in frozen]
    made = UpdateHooks(optimizer, [params[:2], params[2:]], pieces, "012", frozen=lambda: chosen, **how)
    return made, optimizer, params


def test_the_hooks_of_an_update():
    made, optimizer, params = hooks(frozen=(2,), clip_each=3.0)
    optimizer.step()
    made.check()
    norms = [(1 - param).norm().item() for param in params]
    assert norms == pytest.approx([3**0.5, 3.0, 0.0])
    assert params[2].grad.tolist() == [100.0] * 3  # DeepSpeed's buffer is where it was


def test_half_a_group_cannot_be_frozen():
    _, optimizer, _ = hooks(frozen=(0,))
    with pytest.raises(ValueError, match=r"frozen\(\) of the objective names 1 of the 2 parameters"):
        optimizer.step()


def test_an_update_past_the_optimiser_is_noticed():
    made, optimizer, _ = hooks(frozen=())
    optimizer.param_groups = optimizer.param_groups[:1]
    optimizer.step()
    with pytest.raises(RuntimeError, match="has updated 1 of 2 groups past the optimiser"):
        made.check()


@pytest.mark.parametrize(
    "zero, named",
    [
        ({"offload_optimizer": {"device": "nvme"}}, "efficiency.offload_optimizer=nvme"),
        ({"offload_param": {"device": "nvme"}}, "efficiency.offload_param=nvme"),
        ({"zero_hpz_partition_size": 2}, "efficiency.deepspeed.zero_optimization.zero_hpz_partition_size=2"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights=True"),
    ],
)
def test_a_teacher_out_of_reach_is_refused(zero, named):
    averages.refuse({"offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 1})
    with pytest.raises(ValueError, match=f"{named}: not with an objective that has a teacher"):
        averages.refuse(zero)
