"""What a run exports, as timm and transformers load it: the same features as the encoder that was trained."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmim._version import __version__
from fastmim.engine.checkpoint import convert, export, save_checkpoint
from fastmim.engine.distributed import World
from fastmim.engine.local import LocalEngine
from fastmim.engine.train import train
from fastmim.interop import load_weights
from fastmim.interop.timm_config import timm_config
from fastmim.models import create_encoder
from fastmim.objectives import create_objective

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(__file__).with_name("old_checkpoints") / "local"
SWIN = dict(embed_dim=16, depths=(2, 2), num_heads=(2, 4))
VIT = dict(name="vit", embed_dim=24, depth=4, num_heads=3)
# As conftest's runs have it.
ENCODER_OF_RUNS = dict(name="swinv2", img_size=32, patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2),
                       window_size=4)  # fmt: skip
# Sizes, windows, channels and switches that no name of timm's has.
CASES = {
    "swin": dict(SWIN, name="swin", img_size=64, window_size=4),
    "swin, all other": dict(SWIN, name="swin", img_size=(64, 96), window_size=(4, 8), in_chans=1, qkv_bias=False,
                            mlp_ratio=2.0, patch_size=2),
    "swin, window larger than the map": dict(SWIN, name="swin", img_size=32, window_size=9),
    "swinv2, RGBA": dict(SWIN, name="swinv2", img_size=64, window_size=4, in_chans=4),
    "swinv2, stretched window": dict(SWIN, name="swinv2", img_size=64, window_size=8, pretrained_window_size=4),
    "swinv2, rectangles": dict(SWIN, name="swinv2", img_size=(64, 32), window_size=(8, 4)),
    "vit": dict(VIT, img_size=64, shared_rel_pos_bias=True, init_values=0.1),
    "vit, bias per block": dict(VIT, img_size=(32, 48), patch_size=8, rel_pos_bias=True),
    "vit, fixed positions": dict(VIT, img_size=(32, 48), patch_size=8, abs_pos_embed="sincos"),
    "vit, positions": dict(VIT, img_size=64, abs_pos_embed=True, qkv_bias=False, init_values=0.0),
}  # fmt: skip


def randomise(module):
    """Weights large enough that every term shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def weights_of(encoder):
    return {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}


@pytest.mark.parametrize("case", CASES)
def test_timm_and_transformers_compute_our_features(case, tmp_path):
    from transformers import AutoModel, TimmWrapperModel

    encoder = create_encoder(CASES[case]).eval()
    randomise(encoder)
    save_file(weights_of(encoder), tmp_path / "encoder.safetensors", {"format": "pt"})
    content = timm_config(CASES[case], mean=(0.5,), std=(0.2,), weights="encoder.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))

    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, encoder.in_chans, *encoder.img_size, generator=torch.Generator().manual_seed(1))
    theirs = model.forward_features(images)
    maps = theirs[:, 1:].unflatten(1, encoder.grid) if CASES[case]["name"] == "vit" else theirs
    torch.testing.assert_close(maps, encoder(images), rtol=1e-5, atol=1e-5)
    # The mean over tokens of a model without a head, and of a rectangle or grey image its own size and mean.
    torch.testing.assert_close(model(images), maps.mean((1, 2)), rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (encoder.in_chans, *encoder.img_size)
    assert (data["mean"], data["std"]) == ([0.5] * encoder.in_chans, [0.2] * encoder.in_chans)

    wrapped = AutoModel.from_pretrained(tmp_path)
    assert isinstance(wrapped, TimmWrapperModel)
    assert torch.equal(wrapped(images).last_hidden_state, theirs)
    assert torch.equal(wrapped(images).pooler_output, model(images))


def blocks(title):
    """The Python of a section of the README, as lists of lines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]


def test_the_lines_of_the_readme(settings, tmp_path, monkeypatch):
    """Three each for timm, its maps and transformers, on what a run has left, mean and std of its config included."""
    monkeypatch.chdir(tmp_path)
    train(settings("runs/mine", train__steps=2, data__num_workers=0, data__mean=[0.1, 0.2, 0.3]))
    objective = create_objective("simmim", encoder=ENCODER_OF_RUNS, unit=8).eval()
    load_weights(objective, "runs/mine/encoder.safetensors")
    images = torch.randn(1, 3, 32, 32)
    expected = objective.encoder(images)

    lines = blocks("Into other tools")[:3]
    assert [len(block) for block in lines] == [3, 3, 3]
    classify, maps, hub = ({"images": images} for _ in range(3))
    for block, names in zip(lines, (classify, maps, hub), strict=True):
        exec("\n".join(block), names)  # noqa: S102

    model = classify["model"].eval()
    torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-5)
    assert model(images).shape == (1, 10)
    prepared = classify["transform"](Image.new("RGB", (48, 40), (51, 102, 153)))
    assert prepared.shape == (3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.229, 0.224, 0.225])
    of_one_colour = (torch.tensor([0.2, 0.4, 0.6]) - mean) / std
    torch.testing.assert_close(prepared.mean((1, 2)), of_one_colour, rtol=1e-4, atol=1e-4)

    backbone = maps["backbone"]
    assert [tuple(one.shape) for one in maps["maps"]] == [(1, 8, 8, 8), (1, 4, 4, 16)]
    assert backbone.feature_info.reduction() == [4, 8] and backbone.feature_info.channels() == [8, 16]

    hidden = hub["model"](images).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    pixels = hub["processor"](Image.new("RGB", (48, 40), (51, 102, 153)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], of_one_colour[:, None, None].expand(3, 32, 32), rtol=1e-4, atol=1e-4)


def test_convert_writes_a_folder_for_the_hub(tmp_path):
    assert convert(STORED, tmp_path / "v1.2") == tmp_path / "v1.2"
    assert sorted(path.name for path in (tmp_path / "v1.2").iterdir()) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{tmp_path / 'v1.2'}", pretrained=True).eval()
    stored = load_file(STORED / "checkpoints/step-00000002/model.safetensors")
    assert all(torch.equal(stored[f"encoder.{name}"], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"w\.pth: must end in \.safetensors"):
        convert(STORED, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(STORED, tmp_path / "whole", whole=True)


def test_the_header_says_all_that_a_loader_needs(tmp_path):
    """Also what the config had left to the size or to a default."""
    convert(STORED, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        said = file.metadata()
    encoder, statistics = json.loads(said["encoder"]), json.loads(said["statistics"])
    assert said["version"] == __version__
    assert {key: encoder[key] for key in ("name", "img_size", "window_size", "in_chans", "mlp_ratio")} == {
        "name": "swinv2", "img_size": 32, "window_size": 4, "in_chans": 3, "mlp_ratio": 4.0
    }  # fmt: skip
    assert statistics == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"}


def test_what_timm_has_no_model_for_gets_no_config(new_objective, tmp_path, caplog):
    """Extra norms, as in SwinV2-H; the config.json of an earlier run in the folder does not stay beside its weights."""
    objective = new_objective(extra_norm_period=2)
    engine = LocalEngine(objective, torch.optim.AdamW(objective.parameters()))
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.optimizer.step()
    encoder = ENCODER_OF_RUNS | {"extra_norm_period": 2}
    run = {f"model.{key}": value for key, value in encoder.items()}
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    state = {"run": run, "total": 9, "images": "none"}
    checkpoint = save_checkpoint(tmp_path / "checkpoints", engine, state, keep=1, world=world)
    (tmp_path / "config.json").touch()
    statistics = {"mean": [0.5], "std": [0.5], "interpolation": "bilinear"}
    with caplog.at_level(logging.INFO, "fastmim"):
        export(checkpoint, tmp_path / "encoder.safetensors", encoder=encoder, statistics=statistics)
    assert "no config.json beside it: timm's SwinV2 has no norms after" in caplog.text
    assert not (tmp_path / "config.json").exists() and load_file(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"extra_norm_period.*; write a \.safetensors file"):
        convert(tmp_path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "encoder",
    [dict(VIT, img_size=(32, 224), rel_pos_bias=True), dict(SWIN, name="swin", img_size=(32, 160), window_size=(1, 5))],
)
def test_a_rectangle_that_timm_takes_for_a_square_is_refused(encoder, tmp_path, monkeypatch):
    """3 · 27 = 9 · 9 offsets, and 1 · 9 = 3 · 3: with a config, timm would change the biases while it loads them."""
    with pytest.raises(ValueError, match="timm would take position biases of"):
        timm_config(encoder, mean=(0.5,), std=(0.5,))
    monkeypatch.setattr("fastmim.interop.timm_config.why_not_timm", lambda _: None)
    ours = create_encoder(encoder)
    randomise(ours)
    save_file(weights_of(ours), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(timm_config(encoder, mean=(0.5,), std=(0.5,))))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
    (table, *_) = [name for name in theirs if "bias_table" in name]
    assert not torch.equal(theirs[table], ours.state_dict()[table])


def test_the_order_of_padding_and_shift_is_noted():
    """A map of 11 that windows of 4 do not divide: timm computes what policy=parity trains."""
    statistics = dict(mean=(0.5,), std=(0.5,))
    padded = dict(SWIN, name="swin", img_size=44, window_size=4)
    assert "accelerate" in timm_config(padded, **statistics)["pretrained_cfg"]["notes"][0]
    assert "notes" not in timm_config(padded | {"policy": "parity"}, **statistics)["pretrained_cfg"]
    assert "notes" not in timm_config(padded | {"img_size": 64}, **statistics)["pretrained_cfg"]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("swin_base", "swin_base_patch4_window7_224"), ("swinv2_large", "swinv2_large_window12_192"),
     ("swinv2_tiny", "swinv2_tiny_window8_256"), ("vit_large", "beit_large_patch16_224"),
     ("vit_huge", "beit_base_patch16_224"), ("swinv2_g", "swinv2_tiny_window8_256")],
)  # fmt: skip
def test_published_sizes_fit_strictly(name, architecture):
    """Names and shapes of the whole models, with the numbers of the config whatever the name says."""
    content = timm_config({"name": name}, mean=(0.5,), std=(0.5,))
    assert content["architecture"] == architecture
    with torch.device("meta"):
        encoder = create_encoder({"name": name})
        model = timm.create_model(architecture, num_classes=0, **content["model_args"])
    ours, theirs = weights_of(encoder), model.state_dict()
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    assert content["num_features"] == model.num_features == encoder.num_features
