"""Whole runs of a tiny iBOT: outputs, an exact restart, the exported teacher."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastmim.config import load_config
from fastmim.engine.checkpoint import convert
from fastmim.engine.metrics import read_rows
from fastmim.engine.train import train

KEYS = [
    "model.name=vit", "model.img_size=32", "model.patch_size=8", "model.embed_dim=24", "model.depth=2",
    "model.num_heads=3", "model.key_bias=true", "model.abs_pos_embed=true", "model.init=timm",
    "model.drop_path_rate=0.2", "objective.name=ibot", "objective.out_dim=32", "objective.hidden_dim=16",
    "objective.bottleneck_dim=16", "objective.local_crops=2", "objective.local_size=16",
    "objective.warmup_teacher_temp_epochs=2", "objective.momentum_teacher=0.9", "objective.freeze_last_layer=1",
    "data.num_workers=0", "optim.weight_decay_end=0.4", "optim.clip_each=true", "optim.lr=1e-3",
    "optim.lr_batch=null", "optim.warmup_steps=2", "optim.warmup_inclusive=true", "train.steps=6",
    "train.micro_batch_size=4", "train.log_every=1", "train.save_every=3", "train.keep=5", "output.pictures=2",
    "efficiency.threads=1",
]  # fmt: skip
FORGOTTEN = {"images_per_sec", "step_time", "data_time", "peak_memory_gib"}


def run(photos, folder, *more):
    return train(load_config(None, [*KEYS, f"data.path={photos}", f"output.dir={folder}", *more]))


def told(folder):
    return [{key: v for key, v in row.items() if key not in FORGOTTEN} for row in read_rows(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("ibot")
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8, generator=generator)
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{i}.png")
    return folder, run(folder / "photos", folder / "run")


def test_a_run_tells_of_both_losses_and_of_collapse_and_draws_attention(whole):
    folder, result = whole
    rows = told(folder / "run")
    names = {"cls", "patch", "teacher_entropy", "mean_entropy", "agreement"}
    assert len(rows) == 6 and all(names <= row.keys() for row in rows)
    assert all(abs(row["loss"] - row["cls"] - row["patch"]) < 1e-4 for row in rows)
    assert result.picture_path is not None and result.picture_path.is_file()


def test_a_restart_is_exact(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run(folder / "photos", tmp_path / "run")
    assert told(tmp_path / "run") == told(folder / "run")
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [load_file(f / "run/checkpoints/step-00000006" / name) for f in (folder, tmp_path)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


def test_timm_takes_the_teacher_and_the_student_by_name(whole, tmp_path):
    folder, result = whole
    weights = load_file(folder / "run/checkpoints/step-00000006/model.safetensors")
    student = load_file(convert(folder / "run", tmp_path / "student.safetensors", student=True))
    for exported, prefix in ((load_file(result.encoder_path), "teacher.encoder."), (student, "encoder.")):
        assert all(torch.equal(tensor, weights[prefix + name]) for name, tensor in exported.items())
    model = timm.create_model(f"local-dir:{folder / 'run'}", pretrained=True)
    assert model.global_pool == "token"
    assert torch.equal(model.blocks[1].attn.qkv.bias, weights["teacher.encoder.blocks.1.attn.qkv.bias"])
