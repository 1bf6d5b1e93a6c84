"""ZeRO at every stage trains like one process without DeepSpeed, and holds what it promises to hold."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

# Small buckets and no parameter kept gathered: a model this small would otherwise never be cut.
CUT = {
    "efficiency__deepspeed": "{zero_optimization: {reduce_bucket_size: 5000, stage3_prefetch_bucket_size: 1000, "
    "stage3_param_persistence_threshold: 0}}"
}
RUNS = {
    "ddp": {},
    "stage0": dict(efficiency__zero_stage=0),
    "stage1": dict(efficiency__zero_stage=1),
    "stage2": dict(efficiency__zero_stage=2),
    "stage3": dict(efficiency__zero_stage=3, **CUT),
    "stage0 in 4": dict(efficiency__zero_stage=0, train__micro_batch_size=1),
    "stage2 in 4": dict(efficiency__zero_stage=2, train__micro_batch_size=1),
    "stage3 in 4": dict(efficiency__zero_stage=3, train__micro_batch_size=1),
    "stage1 offload": dict(efficiency__zero_stage=1, efficiency__offload_optimizer="cpu"),
    "stage2 offload": dict(efficiency__zero_stage=2, efficiency__offload_optimizer="cpu"),
    "stage3 offload": dict(
        efficiency__zero_stage=3, efficiency__offload_optimizer="cpu", efficiency__offload_param="cpu"
    ),
    "stage3 full": dict(efficiency__zero_stage=3, efficiency__recompute="full", **CUT),
    "stage3 full offload": dict(
        efficiency__zero_stage=3, efficiency__recompute="full", efficiency__recompute_offload="true"
    ),
    "stage3 every second": dict(efficiency__zero_stage=3, efficiency__recompute="full", efficiency__recompute_every=2),
    "stage3 gemm": dict(efficiency__zero_stage=3, efficiency__recompute="gemm", **CUT),
    "stage2 fc1": dict(efficiency__zero_stage=2, efficiency__recompute="fc1"),
    "stage3 fc1_qkv": dict(efficiency__zero_stage=3, efficiency__recompute="fc1_qkv", **CUT),
}
VISIBLE = dict(objective__visible_only="true", objective__decoder_dim=16, objective__decoder_num_heads=2)
"""A Swin of visible tokens, whose blocks read other inputs, and a decoder."""
VISIBLE_RUNS = {
    f"visible {name}": {**RUNS[name], **VISIBLE} for name in ("ddp", "stage1", "stage2 offload", "stage3 full")
}
BF16 = {
    f"stage{stage} bf16": dict(efficiency__zero_stage=stage, efficiency__precision="bf16", **CUT) for stage in range(4)
}
BF16["visible stage3 bf16"] = {**BF16["stage3 bf16"], **VISIBLE}
MAE = dict(
    model__name="vit", model__img_size=32, model__patch_size=8, model__embed_dim=16, model__depth=2,
    model__num_heads=2, model__depths=..., model__window_size=..., model__key_bias="true",
    model__abs_pos_embed="sincos", model__init="mae", objective__name="mae", objective__unit=...,
    objective__norm_pix_loss="true", objective__decoder_embed_dim=8, objective__decoder_depth=2,
    objective__decoder_num_heads=2,
)  # fmt: skip
# Frozen positions, a decoder, and modules that a rank reads without calling them.
MAE_RUNS = {
    f"mae {name}": RUNS[name] | MAE for name in ("ddp", "stage0 in 4", "stage1", "stage2", "stage3", "stage3 full")
}
SWIN_MAE = {key: value for key, value in MAE.items() if key.startswith("objective__")}
"""Of the SwinV2 that the other runs have, its visible tokens."""
MAE_RUNS["mae swin stage3"] = RUNS["stage3"] | SWIN_MAE
MAE_BF16 = {"mae stage3 bf16": BF16["stage3 bf16"] | MAE}


WATCHED = ("ddp", "stage2", "stage3")


@pytest.fixture(scope="module")
def alone(zero_run, launch, labelled, tmp_path_factory):
    """One process: without DeepSpeed, whose features are looked at, and ZeRO-3 with nobody to share with."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {"plain": dict(data__labelled_path=str(labelled)), "stage3": dict(efficiency__zero_stage=3), "mae": MAE}
    runs |= {"visible": VISIBLE, "mae swin": SWIN_MAE}
    launch([zero_run(folder / name, 1, **changes) for name, changes in runs.items()], 1)
    return folder


@pytest.fixture(scope="module")
def two(zero_run, launch, labelled, tmp_path_factory):
    """All runs on two ranks; features are looked at where that needs both, and where it does not."""
    folder = tmp_path_factory.mktemp("two")
    runs = RUNS | BF16 | MAE_RUNS | MAE_BF16 | VISIBLE_RUNS
    for name in WATCHED:
        runs[name] = runs[name] | dict(data__labelled_path=str(labelled))
    launch([zero_run(folder / name, 2, **changes) for name, changes in runs.items()], 2)
    return folder


FOUR = ("stage0", "stage1", "stage2", "stage3", "stage2 in 4", "stage2 offload", "stage3 full", "stage3 fc1_qkv")


@pytest.fixture(scope="module")
def four(zero_run, launch, tmp_path_factory):
    """One of each kind on four ranks; with a quarter of the batch, "in 4" is in 2."""
    folder = tmp_path_factory.mktemp("four")
    launch([zero_run(folder / name, 4, **RUNS[name]) for name in FOUR], 4)
    return folder


def curve(folder, key="loss"):
    return [json.loads(line).get(key) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(folder, other, rtol, atol):
    assert len(curve(folder)) == 10
    torch.testing.assert_close(torch.tensor(curve(folder)), torch.tensor(curve(other)), rtol=rtol, atol=0)
    torch.testing.assert_close(
        load_file(folder / "encoder.safetensors"), load_file(other / "encoder.safetensors"), rtol=0, atol=atol
    )


# Only the order of sums differs: 2^-24 per operation, some ten deep, over ten steps. With lr 1e-2 and eps 1e-3 a
# gradient off by 1e-7 moves a weight by up to 1e-6 per step.
@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process_without_deepspeed(name, two, alone):
    compare(two / name, alone / "plain", rtol=1e-5, atol=1e-5)
    norms = torch.tensor(curve(two / name, "grad_norm")), torch.tensor(curve(alone / "plain", "grad_norm"))
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", WATCHED)
def test_features_of_all_ranks_are_those_of_one_process(name, two, alone):
    """23 images: the ranks have different numbers of them, and of batches."""
    knn, rank = ([curve(where, key)[-1] for where in (two / name, alone / "plain")] for key in ("knn_top1", "rankme"))
    assert knn[0] == knn[1] > 50
    assert rank[0] == pytest.approx(rank[1], rel=1e-3)


@pytest.mark.parametrize("name", MAE_RUNS)
def test_mae_equals_one_process_without_deepspeed(name, two, alone):
    compare(two / name, alone / ("mae swin" if "swin" in name else "mae"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VISIBLE_RUNS)
def test_visible_tokens_only_equal_one_process(name, two, alone):
    compare(two / name, alone / "visible", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process_without_deepspeed(name, four, alone):
    compare(four / name, alone / "plain", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "full offload", "every second", "gemm", "fc1_qkv"])
def test_recomputation_changes_no_bit(name, two):
    compare(two / f"stage3 {name}", two / "stage3", rtol=0, atol=0)


def test_alone_under_zero(alone):
    compare(alone / "stage3", alone / "plain", rtol=1e-6, atol=1e-6)


def test_mae_in_bf16_stays_close(two, alone):
    found, expected = curve(two / "mae stage3 bf16"), curve(alone / "mae")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-2, atol=0)


# Products of 8 bits of mantissa; master weights and moments are fp32, so the error does not grow with the steps.
@pytest.mark.parametrize("name", BF16)
def test_bf16_is_near_fp32(name, two, alone):
    reference = alone / ("visible" if "visible" in name else "plain")
    found, expected = torch.tensor(curve(two / name)), torch.tensor(curve(reference))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_what_a_rank_holds(two):
    """4 bytes per fp32 value; a stage halves what it cuts on two ranks, but for padding of a few values a tensor.

    Gradients once they are reduced: until then stage 1 has all of them, and stages 2 and 3 those of a bucket. Stages
    1 and 2 in fp32 hold the whole of a tensor that the cut goes through, of which there can be one a group.
    """
    sizes = [t.numel() for t in load_file(two / "ddp/checkpoints/step-00000010/model.safetensors").values()]
    values, straddling = sum(sizes), 4 * max(sizes)
    slack = 24 * 63  # bytes of padding and alignment for each of 63 tensors
    full, half = 4 * values, 2 * values
    expected = {
        "stage0": dict(weights=full, master=0, moments=2 * full, gradients=full),
        "stage1": dict(weights=full, master=half, moments=full, gradients=half),
        "stage2": dict(weights=full, master=half, moments=full, gradients=half),
        "stage3": dict(weights=half, master=half, moments=full, gradients=half),
        "stage1 bf16": dict(weights=full / 2, master=half, moments=full),
        "stage2 bf16": dict(weights=full / 2, master=half, moments=full, gradients=half),
        "stage3 bf16": dict(weights=half / 2, master=half, moments=full, gradients=half),
    }
    for name, formula in expected.items():
        for rank in range(2):
            held = json.loads((two / name / f"held-{rank}.json").read_text())
            for what, size in formula.items():
                over = straddling if what == "gradients" and name in ("stage1", "stage2") else 0
                assert size - slack <= held[what] <= size + over + slack, (name, rank, what)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_non_finite_step_is_named(stage, zero_run, launch, tmp_path):
    """A learning rate of 1e30 makes the weights useless in one step; the second must not be applied."""
    run = zero_run(tmp_path / "run", 1, efficiency__zero_stage=stage, optim__lr=1e30, optim__clip_grad="null")
    errors = launch([run], 1, fails=True)
    assert "non-finite loss or gradient at step 2" in errors, errors[-2000:]
