"""Whole runs of a tiny tokenizer, and of a BEiT on its codes: outputs, exact restarts, what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastmim.cli import main
from fastmim.config import load_config
from fastmim.data import build_loader
from fastmim.engine.train import train
from fastmim.objectives.tokenizer import read_tokenizer
from tests.engine.restarts import check_same, cut, told

SHARED = [
    "data.num_workers=0", "optim.lr=1e-3", "optim.lr_batch=null", "optim.warmup_steps=2", "train.steps=6",
    "train.micro_batch_size=4", "train.log_every=1", "train.save_every=3", "train.keep=5", "output.pictures=2",
    "output.loggers=[]", "efficiency.threads=1",
]  # fmt: skip
TOKENIZER = [
    *SHARED, "model.name=dvae", "model.img_size=16", "model.patch_size=4", "model.embed_dim=8", "model.depth=1",
    "model.codes=16", "model.code_dim=8", "objective.name=dvae", "objective.balance_weight=0.01",
]  # fmt: skip
BEIT = [
    *SHARED, "model.name=vit", "model.img_size=32", "model.patch_size=8", "model.embed_dim=24", "model.depth=2",
    "model.num_heads=3", "model.shared_rel_pos_bias=true", "model.init_values=0.1", "model.drop_path_rate=0.1",
    "objective.name=beit", "objective.num_mask=6", "objective.min_block=2", "data.interpolation=bicubic",
]  # fmt: skip


def run(keys, folder, *more):
    return train(load_config(None, [*keys, f"data.path={folder.parent / 'photos'}", f"output.dir={folder}", *more]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Eight photographs, a tokenizer trained on them, and a BEiT trained with it."""
    folder = tmp_path_factory.mktemp("beit")
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{i}.png")
    tokenizer = run(TOKENIZER, folder / "tokenizer")
    more = [f"objective.tokenizer={tokenizer.encoder_path}", f"data.val_path={folder / 'photos'}"]
    beit = run(BEIT, folder / "beit", *more)
    assert tokenizer.picture_path.is_file() and beit.picture_path.is_file()
    return folder


def test_the_metrics(home):
    rows = told(home / "tokenizer")
    assert {"mse", "mean_colour", "codes_used", "perplexity"} <= rows[0].keys()
    assert 0 < rows[-1]["codes_used"] <= 1 and 1 <= rows[-1]["perplexity"] <= 16
    rows = told(home / "beit")
    assert all(0 <= row["accuracy"] <= 1 for row in rows) and rows[0]["loss"] == pytest.approx(2.77, abs=0.2)  # log 16
    assert "val_loss" in rows[-1]


@pytest.mark.parametrize("name", ["tokenizer", "beit"])
def test_a_restart_is_exact(name, home):
    copy = home / f"{name} again"
    cut(home / name, copy, 6)
    more = [f"objective.tokenizer={home / 'tokenizer'}", f"data.val_path={home / 'photos'}"] if name == "beit" else []
    run(BEIT if name == "beit" else TOKENIZER, copy, *more)  # the folder names the same tokenizer as the file did
    check_same(copy, home / name, 6)


def test_another_tokenizer_is_another_run(home):
    other = home / "other.safetensors"
    tensors, settings = load_file(home / "tokenizer/encoder.safetensors"), '{"name": "dvae", "img_size": 16, '
    settings += '"patch_size": 4, "embed_dim": 8, "depth": 1, "codes": 16, "code_dim": 8}'
    save_file({k: t + 0.1 for k, t in tensors.items()}, other, {"encoder": settings})
    more = [f"objective.tokenizer={other}", f"data.val_path={home / 'photos'}"]
    with pytest.raises(ValueError, match="objective.tokenizer=.*is another run"):
        run(BEIT, home / "beit", *more)
    with pytest.raises(ValueError, match="objective.tokenizer=null: give the encoder.safetensors"):
        run(BEIT, home / "none")
    assert not (home / "none").exists()


def test_timm_takes_the_encoder(home):
    model = timm.create_model(f"local-dir:{home / 'beit'}", pretrained=True)
    weights = load_file(home / "beit/checkpoints/step-00000006/model.safetensors")
    table = "rel_pos_bias.relative_position_bias_table"
    assert torch.equal(model.state_dict()[table], weights[f"encoder.{table}"])
    assert not any("tokenizer" in name for name in weights)


def test_the_commands(home, capsys):
    keys = [f"data.path={home / 'photos'}", f"output.dir={home / 'never'}"]
    simmim = home / "simmim.yaml"
    simmim.write_text("model: {name: swin_tiny}\n")
    assert main(["tokenizer", "train", str(simmim), *keys]) == 2
    assert "objective.name=simmim: this command trains dvae; use fastmim pretrain" in capsys.readouterr().err
    picture = home / "codes.png"
    assert main(["tokenizer", "codes", str(home / "tokenizer"), str(home / "photos"), "--picture", str(picture)]) == 0
    found = capsys.readouterr().out
    tokenizer, used = read_tokenizer(home / "tokenizer"), set()
    how = dict(img_size=(16, 16), micro_batch_size=8, train=False, num_workers=0)
    with build_loader(path=home / "photos", **how) as loader:
        for batch in loader.epoch(0):
            used |= set(tokenizer(batch.images / 255).flatten().tolist())
    assert f"8 images: {len(used)} of 16 codes occur" in found and picture.is_file()
