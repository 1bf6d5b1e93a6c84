"""``fastmim features``: rows in the order of the files, each what the encoder gives for that image alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as tv

from fastmim import cli
from fastmim.engine import extract
from fastmim.engine.probe import load_encoder
from fastmim.interop.facts import header
from fastmim.models import create_encoder

SWIN = dict(name="swinv2", img_size=32, patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4)
VIT = dict(name="vit", img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, key_bias=True, abs_pos_embed=True)


def stored(settings, file):
    torch.manual_seed(0)
    encoder = create_encoder(settings)
    for param in encoder.parameters():
        torch.nn.init.normal_(param, std=0.3)
    weights = {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}
    save_file(weights, file, header(settings, {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4]}))
    return load_encoder(file)


def one_image(objective, path):
    """(1, 3, 32, 32): resized to 37 (256/224 of 32), cut in the middle, normalised."""
    with Image.open(path) as image:
        resized = tv.resize(tv.pil_to_tensor(image), [37], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    return objective.normalise(tv.center_crop(resized, [32, 32])[None])


def run(*argv):
    return cli.main(["features", *map(str, argv), "data.num_workers=0"])


@torch.no_grad()
def test_rows_are_those_of_single_images_and_bad_files_are_named(labelled, tmp_path, capsys):
    folder = tmp_path / "images"
    for path in labelled.rglob("*.png"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    (folder / "a" / "05.png").write_text("no image")
    objective = stored(SWIN, tmp_path / "e.safetensors")
    out = tmp_path / "new" / "f.safetensors"
    assert run(tmp_path / "e.safetensors", folder, "--out", out, "--maps", "--batch", 4) == 0
    told = capsys.readouterr().out
    assert "left out " in told and "a/05.png: not an image" in told and "23 images, 2 classes, 1 bad file" in told
    paths = [path for path in sorted(folder.rglob("*.png")) if path.name != "05.png" or path.parent.name != "a"]
    rows, beside = load_file(out), json.loads(out.with_suffix(".json").read_text())
    assert beside["files"] == [str(path.relative_to(folder)) for path in paths] and len(beside["bad"]) == 1
    assert [beside["classes"][label] for label in rows["labels"]] == [path.parent.name for path in paths]
    maps = torch.cat([objective.encoder(one_image(objective, path)) for path in paths])
    torch.testing.assert_close(rows["maps"], maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["pooled"], maps.mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert beside["encoder"]["name"] == "swinv2" and sorted(path.name for path in out.parent.iterdir()) == [
        "f.json", "f.safetensors"
    ]  # fmt: skip


@torch.no_grad()
def test_layers_of_a_vit_and_of_a_stage_whose_map_is_gathered(pictures, tmp_path):
    """Blocks from both ends; the first stage's last one, whose map SwinV2 has gathered 2×2 already."""
    objective = stored(VIT, tmp_path / "v.safetensors")
    out = tmp_path / "f.safetensors"
    assert run(tmp_path / "v.safetensors", pictures, "--out", out, "--layers=-1,1", "--maps", "--dtype", "float16") == 0
    rows = load_file(out)
    assert {name: tuple(value.shape[1:]) for name, value in rows.items()} == {
        "block_01.pooled": (8,), "block_01.maps": (4, 4, 8), "block_02.pooled": (8,), "block_02.maps": (4, 4, 8)
    }  # fmt: skip
    assert all(value.dtype == torch.float16 and len(value) == 22 for value in rows.values())
    images = torch.cat([one_image(objective, path) for path in sorted(pictures.iterdir())])
    encoder = objective.encoder
    cls, maps = encoder.forward_tokens(images)
    torch.testing.assert_close(rows["block_02.pooled"], cls.half(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(rows["block_02.maps"], maps.half(), rtol=1e-2, atol=1e-2)
    first = create_encoder(VIT | {"depth": 1})
    first.load_state_dict(encoder.state_dict(), strict=False)
    torch.testing.assert_close(rows["block_01.pooled"], first.forward_tokens(images)[0].half(), rtol=1e-2, atol=1e-2)

    objective = stored(SWIN, tmp_path / "s.safetensors")
    assert run(tmp_path / "s.safetensors", pictures, "--out", out, "--layers", "2", "--maps", "--pool", "mean") == 0
    stage = create_encoder(SWIN | {"depths": (2,), "num_heads": (1,)}).eval()
    weights = {name: value for name, value in objective.encoder.state_dict().items() if not name.startswith("norm.")}
    stage.load_state_dict(weights, strict=False)
    images = torch.cat([one_image(objective, path) for path in sorted(pictures.iterdir())])
    seen = []
    hook = stage.all_blocks()[-1].register_forward_hook(lambda *found: seen.append(found[2][0]))
    stage(images)
    hook.remove()
    assert seen[0].shape == (22, 8, 8, 8)  # of one stage alone nothing is gathered
    torch.testing.assert_close(load_file(out)["block_02.maps"], seen[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_of_what_fails(pictures, tmp_path, monkeypatch, capsys):
    """Neither half a file nor the rows on their way; the file before stays."""
    stored(SWIN, tmp_path / "e.safetensors")
    out = tmp_path / "f.safetensors"
    assert run(tmp_path / "e.safetensors", pictures, "--out", out) == 0
    with safe_open(out, framework="pt") as opened:
        assert opened.get_slice("pooled").get_shape() == [22, 16]
    before, calls = out.read_bytes(), []

    def full(self, name, rows, write=extract._Columns.add):
        calls.append(name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(self.out))
        write(self, name, rows)

    monkeypatch.setattr(extract._Columns, "add", full)
    capsys.readouterr()
    assert run(tmp_path / "e.safetensors", pictures, "--out", out, "--batch", 4) == 1
    assert f"{out}: no space left on device" in capsys.readouterr().err and out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.safetensors", "f.json", "f.safetensors"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "f.pt"], "--out f.pt: must end in .safetensors"),
        (
            ["--out", "f.safetensors", "--layers", "4"],
            "--layers 4: this encoder has 3 blocks; give 1 to 3, or -1 to -3",
        ),
        (["--out", "f.safetensors", "--layers", "0"], "--layers 0: this encoder has 3 blocks"),
        (["--out", "f.safetensors", "--labels", "none.csv"], "data.labels=none.csv: no such file"),
        (["--out", "f.safetensors", "optim.lr=1"], "optim.lr=1: features takes data."),
    ],
)
def test_each_mistake_is_one_line(argv, words, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stored(SWIN, Path("e.safetensors"))
    capsys.readouterr()
    assert run("e.safetensors", pictures, *argv) == 2
    line = [one for one in capsys.readouterr().err.splitlines() if " tensors loaded" not in one]
    assert len(line) == 1 and words in line[0] and not Path("f.safetensors").exists()
