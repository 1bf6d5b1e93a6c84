"""Whole runs of a tiny MAE: a picture, an exact restart while accumulating, the encoder in timm, published configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastmim.cli import main
from fastmim.config import load_config
from fastmim.engine.build import make_schedule
from fastmim.engine.train import train
from fastmim.models import create_encoder
from tests.engine.restarts import check_same, cut

ROOT = Path(__file__).resolve().parents[2]
KEYS = [
    "model.name=vit", "model.img_size=[32, 48]", "model.patch_size=8", "model.embed_dim=24", "model.depth=2",
    "model.num_heads=3", "model.key_bias=true", "model.abs_pos_embed=sincos", "model.init=mae",
    "model.drop_path_rate=0.2", "objective.name=mae", "objective.norm_pix_loss=true", "objective.decoder_embed_dim=16",
    "objective.decoder_depth=1", "objective.decoder_num_heads=2", "data.num_workers=0", "optim.lr=1e-3",
    "optim.lr_batch=null", "optim.warmup_steps=2", "train.steps=4", "train.micro_batch_size=2",
    "train.grad_accum_steps=2", "train.log_every=1", "train.save_every=2", "train.keep=5", "output.pictures=2",
    "output.loggers=[]", "efficiency.threads=1",
]  # fmt: skip


def run(pictures, folder):
    return train(load_config(None, [*KEYS, f"data.path={pictures}", f"output.dir={folder}"]))


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "run"
    return folder, run(pictures, folder)


def test_a_restart_is_exact(whole, pictures, tmp_path):
    folder, result = whole
    assert result.picture_path is not None and result.picture_path.is_file()
    cut(folder, tmp_path / "run", 4)
    run(pictures, tmp_path / "run")
    check_same(tmp_path / "run", folder, 4)


def test_timm_computes_the_features_of_the_exported_encoder(whole):
    folder, result = whole
    weights = load_file(result.encoder_path)
    assert "pos_embed" in weights and "mask_token" not in weights
    encoder = create_encoder(dict(name="vit", img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3,
                                  key_bias=True, abs_pos_embed="sincos", init="mae"))  # fmt: skip
    encoder.load_state_dict(weights | {"mask_token": torch.zeros(1, 1, 24)})
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    cls, patches = encoder.eval().forward_tokens(images)
    found = model.forward_features(images)
    torch.testing.assert_close(found[:, 0], cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 1:].unflatten(1, (4, 6)), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"), [("base", (768, 12, 12, 16)), ("large", (1024, 24, 16, 16)), ("huge", (1280, 32, 16, 14))]
)
def test_published_configs(name, sizes):
    """He et al. 2022, tables 8 and 10; per epoch of ImageNet-1K, 312 steps of 4096 images."""
    cfg = load_config(ROOT / f"configs/mae/vit_{name}.yaml")
    model = cfg.model
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == sizes
    assert cfg.objective.arguments() == dict(mask_ratio=0.75, norm_pix_loss=True, decoder_embed_dim=512,
                                             decoder_depth=8, decoder_num_heads=16)  # fmt: skip
    schedule = make_schedule(cfg, 312, 4096)
    assert schedule(0) == 0 and schedule(800 * 312) == pytest.approx(0, abs=1e-12)
    assert schedule(20 * 312) == pytest.approx(1.2e-3) and schedule(40 * 312) == pytest.approx(2.4e-3)
    assert schedule(420 * 312) == pytest.approx(1.2e-3)
    assert (cfg.optim.betas, cfg.optim.weight_decay, cfg.optim.clip_grad) == ((0.9, 0.95), 0.05, None)
    assert (cfg.data.scale, cfg.data.interpolation) == ((0.2, 1.0), "bicubic")


def test_nothing_is_drawn_by_a_decoder_that_nobody_has_trained(whole, pictures, tmp_path, capsys):
    """Begun from an encoder alone, at a rate of 0; after the run above, or one update, it is another decoder."""
    keys = [f"model.init_from={whole[1].encoder_path}", "optim.lr=0", "optim.warmup_lr=0", "optim.min_lr=0"]
    words = [*KEYS, *keys, "train.steps=1", f"data.path={pictures}", f"output.dir={tmp_path}/run"]
    result = train(load_config(None, words))
    assert result.picture_path is None
    assert "no picture at step 1: the decoder has not been trained yet" in "".join(capsys.readouterr())
    assert main(["reconstruct", str(tmp_path / "run"), str(pictures), "--out", str(tmp_path / "out.png")]) == 2
    assert "run: the decoder has never been trained, and its picture would be noise" in capsys.readouterr().err
    assert main(["reconstruct", str(whole[0]), str(pictures), "--out", str(tmp_path / "out.png"), "--most", "1"]) == 0
