"""Whole runs of a tiny iBOT and a tiny MoCo v3: outputs, an exact restart, the exported encoder."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastmim.config import load_config
from fastmim.engine.checkpoint import convert
from fastmim.engine.train import train
from tests.engine.restarts import check_same, cut, told

KEYS = [
    "model.name=vit", "model.img_size=32", "model.patch_size=8", "model.embed_dim=24", "model.depth=2",
    "model.num_heads=3", "model.key_bias=true", "model.drop_path_rate=0.2", "objective.out_dim=32",
    "objective.hidden_dim=16", "data.num_workers=0", "optim.weight_decay_end=0.4", "optim.clip_each=true",
    "optim.lr=1e-3", "optim.lr_batch=null", "optim.warmup_steps=2", "optim.warmup_inclusive=true", "train.steps=6",
    "train.micro_batch_size=4", "train.log_every=1", "train.save_every=3", "train.keep=5", "output.pictures=2",
    "efficiency.threads=1",
]  # fmt: skip
OWN = {
    "ibot": [
        "objective.name=ibot", "model.abs_pos_embed=true", "model.init=timm", "objective.bottleneck_dim=16",
        "objective.local_crops=2", "objective.local_size=16", "objective.warmup_teacher_temp_epochs=2",
        "objective.momentum_teacher=0.9", "objective.freeze_last_layer=1",
    ],
    "moco": [
        "objective.name=moco", "model.abs_pos_embed=sincos_moco", "model.init=moco", "objective.momentum=0.9",
        "optim.policy=parity",
    ],
}  # fmt: skip


def run(name, photos, folder):
    return train(load_config(None, [*KEYS, *OWN[name], f"data.path={photos}", f"output.dir={folder}"]))


@pytest.fixture(scope="module", params=list(OWN))
def whole(request, tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp(request.param)
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8, generator=generator)
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{i}.png")
    return request.param, folder, run(request.param, folder / "photos", folder / "run")


def test_a_run_tells_of_collapse_and_draws_attention(whole):
    name, folder, result = whole
    rows = told(folder / "run")
    monitors = {"ibot": {"cls", "patch", "teacher_entropy", "mean_entropy", "agreement"},
                "moco": {"accuracy", "feature_std"}}[name]  # fmt: skip
    assert len(rows) == 6 and all(monitors <= row.keys() for row in rows)
    if name == "ibot":
        assert all(abs(row["loss"] - row["cls"] - row["patch"]) < 1e-4 for row in rows)
    assert result.picture_path is not None and result.picture_path.is_file()


def test_a_restart_is_exact(whole, tmp_path):
    name, folder, _ = whole
    cut(folder / "run", tmp_path / "run", 6)
    run(name, folder / "photos", tmp_path / "run")
    check_same(tmp_path / "run", folder / "run", 6)


def test_timm_takes_the_encoder_that_is_evaluated(whole, tmp_path):
    """iBOT's teacher, or its student on request; the base encoder of MoCo v3, not the momentum encoder."""
    name, folder, result = whole
    weights = load_file(folder / "run/checkpoints/step-00000006/model.safetensors")
    chosen = {"ibot": "teacher.encoder.", "moco": "encoder."}[name]
    student = load_file(convert(folder / "run", tmp_path / "student.safetensors", student=True))
    for exported, prefix in ((load_file(result.encoder_path), chosen), (student, "encoder.")):
        assert all(torch.equal(tensor, weights[prefix + key]) for key, tensor in exported.items())
    model = timm.create_model(f"local-dir:{folder / 'run'}", pretrained=True)
    assert model.global_pool == "token"
    assert torch.equal(model.blocks[1].attn.qkv.bias, weights[f"{chosen}blocks.1.attn.qkv.bias"])
    assert torch.equal(model.pos_embed, weights[f"{chosen}pos_embed"])
