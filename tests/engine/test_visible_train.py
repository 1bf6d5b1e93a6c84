"""A whole run of SimMIM on visible tokens only: outputs, an exact restart, the exported encoder, its plan."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastmim.config import load_config
from fastmim.engine.train import train
from tests.engine.restarts import check_same, cut, told


@pytest.fixture(scope="module")
def config(pictures):
    """Of a Swin whose window shrinks to its last map, drawn depth, accumulation, validation and a picture."""
    keys = [
        "model.name=swin", "model.img_size=64", "model.patch_size=4", "model.embed_dim=8", "model.depths=[2, 2, 2]",
        "model.num_heads=[1, 2, 4]", "model.window_size=5", "model.drop_path_rate=0.2", "objective.unit=16",
        "objective.visible_only=true", "objective.decoder_dim=16", "objective.decoder_num_heads=2",
        f"data.path={pictures}", f"data.val_path={pictures}", "data.num_workers=0", "optim.lr=1e-3",
        "optim.lr_batch=null", "optim.warmup_steps=1", "train.steps=4", "train.micro_batch_size=2",
        "train.grad_accum_steps=2", "train.log_every=1", "train.save_every=2", "train.val_every=4",
        "train.val_batches=1", "train.keep=5", "output.pictures=2", "output.loggers=[]", "efficiency.threads=1",
    ]  # fmt: skip
    return lambda folder: load_config(None, [*keys, f"output.dir={folder}"])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("visible") / "run"
    return folder, train(config(folder))


def test_a_run_draws_what_it_predicts(whole):
    folder, result = whole
    assert len(told(folder)) == 4 and result.picture_path is not None and result.picture_path.is_file()


def test_a_restart_is_exact(whole, config, tmp_path):
    cut(whole[0], tmp_path / "run", 4)
    train(config(tmp_path / "run"))
    check_same(tmp_path / "run", whole[0], 4)


def test_timm_takes_the_encoder_as_a_plain_swin(whole):
    folder, result = whole
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    exported = load_file(result.encoder_path)
    assert exported.keys() == model.state_dict().keys() - {k for k in model.state_dict() if "index" in k or "mask" in k}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in exported.items())
