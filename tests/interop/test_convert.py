"""Encoders from and to other programs: the same features there, the same bits after the way back."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmim import cli
from fastmim.config import load_config
from fastmim.engine.conversion import convert_any
from fastmim.interop import foreign
from fastmim.interop.facts import header
from fastmim.interop.foreign import Said, encoder_in, read_encoder
from fastmim.interop.huggingface_config import why_not_huggingface
from fastmim.interop.load import HEADER
from fastmim.interop.projects import PROJECTS
from fastmim.models import create_encoder, encoder_settings

ROOT = Path(__file__).resolve().parents[2]
SWIN = dict(embed_dim=16, depths=(2, 2), num_heads=(2, 4))
VIT = dict(name="vit", embed_dim=24, depth=2, num_heads=3)
PLAIN = VIT | dict(abs_pos_embed=True, key_bias=True)
# Windows that divide no map, shrink or are stretched; every kind of bias, positions and LayerScale.
CASES = {
    "swin, padded, grey": dict(SWIN, name="swin", img_size=(44, 52), window_size=4, in_chans=1, qkv_bias=False),
    "swinv2, stretched": dict(SWIN, name="swinv2", img_size=64, window_size=8, pretrained_window_size=(4, 3)),
    "swinv2, shrunk": dict(SWIN, name="swinv2", img_size=32, window_size=6, qkv_bias=False),
    "vit of SimMIM": dict(VIT, img_size=64, shared_rel_pos_bias=True, init_values=0.1),
    "vit, bias per block": dict(VIT, img_size=32, patch_size=8, rel_pos_bias=True, abs_pos_embed=True),
    "plain vit, rectangle": dict(PLAIN, img_size=(64, 32)),
    "plain vit, no biases": dict(VIT, img_size=32, abs_pos_embed=True, qkv_bias=False),
}


def built(settings):
    """An encoder whose every weight shows in its features."""
    encoder = create_encoder(settings).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for param in encoder.parameters():
        param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    return encoder


def weights_of(encoder):
    return {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}


def exported(settings, folder):
    """Its file, as a run leaves it."""
    encoder = built(settings)
    statistics = {"mean": [0.4] * encoder.in_chans, "std": [0.2] * encoder.in_chans, "interpolation": "bicubic"}
    save_file(weights_of(encoder), folder / "encoder.safetensors", header(settings, statistics))
    return encoder, folder / "encoder.safetensors"


def same(file, encoder):
    stored, own = load_file(file), weights_of(encoder)
    assert stored.keys() == own.keys()
    assert all(torch.equal(stored[name], own[name]) for name in own)


def tokens_of(encoder, images):
    """(B, N, D) as transformers has them."""
    cls, maps = encoder.forward_tokens(images)
    return torch.cat((cls[:, None], maps.flatten(1, 2)), 1) if len(encoder.all_blocks()) == 2 else maps.flatten(1, 2)


def some_images(encoder):
    return torch.randn(2, encoder.in_chans, *encoder.img_size, generator=torch.Generator().manual_seed(1))


def without_header(file):
    save_file(load_file(file), file, {"format": "pt"})


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_opens_the_folder_and_computes_the_same(case, tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    settings = CASES[case]
    encoder, file = exported(settings, tmp_path)
    convert_any(file, tmp_path / "hf", target="huggingface")
    model, told = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    # Of a ViTModel the pooler, which no pretraining of ours has, is new.
    assert not told["unexpected_keys"] and all(key.startswith("pooler.") for key in told["missing_keys"])
    images = some_images(encoder)
    hidden = model.eval()(images).last_hidden_state
    torch.testing.assert_close(hidden, tokens_of(encoder, images), rtol=1e-5, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == [0.4] * encoder.in_chans and processor.size["height"] == encoder.img_size[0]

    without_header(tmp_path / "hf" / "model.safetensors")
    back = convert_any(tmp_path / "hf", tmp_path / "back.safetensors").foreign
    same(tmp_path / "back.safetensors", encoder)
    assert back.project == "huggingface" and back.statistics["std"] == [0.2] * encoder.in_chans
    full = encoder_settings(settings)
    assert {key: value for key, value in back.settings.items() if value != full[key]} == {}


THEIRS = {
    "SwinForImageClassification": dict(embed_dim=8, depths=[2, 1], num_heads=[1, 2], image_size=32, window_size=4),
    "Swinv2ForMaskedImageModeling": dict(embed_dim=8, depths=[2, 1], num_heads=[1, 2], image_size=32, window_size=4,
                                         pretrained_window_sizes=[0, 0], encoder_stride=8),
    "ViTMAEForPreTraining": dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
                                 image_size=32, decoder_num_hidden_layers=1, layer_norm_eps=1e-6, mask_ratio=0.0),
    "BeitForImageClassification": dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32,
                                       intermediate_size=48, use_relative_position_bias=True, layer_norm_eps=1e-6,
                                       use_mean_pooling=False, use_mask_token=True),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_what_transformers_has_saved_computes_the_same_here(name, tmp_path):
    import transformers

    cls = getattr(transformers, name)
    model = cls(cls.config_class(**THEIRS[name])).eval()
    for param in model.parameters():
        param.add_(torch.randn_like(param) * 0.1)
    model.save_pretrained(tmp_path / "hf")
    done = convert_any(tmp_path / "hf", tmp_path / "encoder.safetensors")
    encoder = create_encoder(done.foreign.settings).eval()
    missing, unexpected = encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=False)
    assert missing == ["mask_token"] and not unexpected
    images = some_images(encoder)
    if name.startswith("ViTMAE"):  # which shuffles the patches, and none is hidden here
        noise = torch.arange(4.0).expand(2, -1)
        hidden = model.vit(images, noise=noise).last_hidden_state
    else:
        hidden = model.base_model(images).last_hidden_state
    torch.testing.assert_close(hidden, tokens_of(encoder, images), rtol=1e-5, atol=1e-5)
    left = {row.name.split(".")[0]: row.reason for row in done.foreign.rows if not row.becomes}
    heads = {"classifier": "head", "decoder": "decoder of the pretraining"}
    assert all(left[key] == heads[key] for key in left.keys() & heads.keys()) and left.keys() & heads.keys()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (dict(SWIN, name="swin", img_size=32, window_size=6), "other windows in stage 2"),
        (dict(SWIN, name="swin", img_size=(64, 32), window_size=4), "other windows in stage 2"),
        (dict(SWIN, name="swinv2", img_size=(44, 52), window_size=6), "other windows in stage 2"),
        (dict(SWIN, name="swinv2", img_size=64, window_size=4, extra_norm_period=2), "extra_norm_period"),
        (dict(SWIN, name="swin", img_size=64, window_size=4, norm_eps=1e-6), "norm_eps"),
        (dict(PLAIN, init_values=0.1), "no LayerScale"),
        (dict(VIT, rel_pos_bias=True, img_size=(32, 64)), "squares alone"),
        (dict(name="dvae"), "autoencoder"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(settings, why):
    assert why in why_not_huggingface(encoder_settings(settings))


TIMM = {
    "swin_tiny_patch4_window7_224": dict(SWIN, img_size=(44, 52), window_size=4),
    "swinv2_tiny_window8_256": dict(SWIN, img_size=64, window_size=8, pretrained_window_sizes=(4, 4)),
    "deit3_small_patch16_224": dict(embed_dim=24, depth=2, num_heads=3, img_size=(32, 64), no_embed_class=False),
    "beit_base_patch16_224": dict(embed_dim=24, depth=2, num_heads=3, img_size=32, global_pool="token"),
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_what_timm_has_saved_computes_the_same_here(name, tmp_path):
    theirs = timm.create_model(name, num_classes=5, **TIMM[name]).eval()
    for param in theirs.parameters():
        param.add_(torch.randn_like(param) * 0.1)
    (tmp_path / "timm").mkdir()
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "timm" / "model.safetensors")
    config = {"architecture": name, "model_args": TIMM[name], "pretrained_cfg": {"mean": [0.5] * 3}}
    (tmp_path / "timm/config.json").write_text(json.dumps(config))
    done = convert_any(tmp_path / "timm", tmp_path / "encoder.safetensors")
    assert [row.reason for row in done.foreign.rows if not row.becomes] == ["head", "head"]
    encoder = create_encoder(done.foreign.settings).eval()
    encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=False)
    images = some_images(encoder)
    hidden = theirs.forward_features(images)
    hidden = hidden.flatten(1, 2) if hidden.ndim == 4 else hidden
    torch.testing.assert_close(hidden, tokens_of(encoder, images), rtol=1e-5, atol=1e-5)
    assert done.foreign.statistics == {"mean": [0.5] * 3}


# A name by which each project's code would miss a tensor that is not there, and where it looks.
NAMES = {
    "simmim": ("model", "encoder.layers.0.downsample.reduction.weight"),
    "swin": ("model", "layers.0.downsample.reduction.weight"),
    "ibot": ("teacher", "backbone.layers.0.downsample.reduction.weight"),
    "mae": ("model", "blocks.0.attn.qkv.bias"),
    "dino": ("teacher", "backbone.blocks.0.attn.qkv.bias"),
    "moco": ("state_dict", "module.base_encoder.blocks.0.attn.qkv.bias"),
    "beit": ("model", "blocks.0.attn.q_bias"),
}


@pytest.mark.parametrize("project", NAMES)
def test_there_and_back_with_and_without_our_header(project, tmp_path):
    settings = dict(SWIN, name="swin", img_size=32, window_size=4)
    if project in ("mae", "dino", "moco"):
        settings = dict(
            PLAIN, img_size=32, embed_dim=384, num_heads=12 if project == "moco" else 6, depth=12, mlp_ratio=0.5
        )
    if project == "beit":
        settings = CASES["vit of SimMIM"]
    encoder, file = exported(settings | ({"norm_eps": 1e-6} if project == "ibot" else {}), tmp_path)
    convert_any(file, tmp_path / "a.pth", target=project)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    place, name = NAMES[project]
    assert content.keys() == {place, HEADER} and name in content[place]
    full = {key: value for key, value in encoder.settings.items() if key != "residual_dtype"}
    for known in (True, False):
        torch.save(content if known else {place: content[place]}, tmp_path / "b.pth")
        back = convert_any(tmp_path / "b.pth", tmp_path / "back.safetensors").foreign
        same(tmp_path / "back.safetensors", encoder)
        expected = "fastmim" if known else "timm" if project in ("mae", "beit") else project  # without their heads
        assert (back.project, back.settings) == (expected, full)
        with safe_open(tmp_path / "back.safetensors", framework="pt") as opened:
            assert json.loads(opened.metadata()["encoder"])["num_heads"] == json.loads(json.dumps(full["num_heads"]))


def all_models():
    """The encoder of every config, each once."""
    found = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if not path.name.startswith("_"):
            settings = encoder_settings(load_config(path).model.encoder_kwargs())
            settings = {key: value for key, value in settings.items() if key != "residual_dtype"}
            if settings["name"] in ("swin", "swinv2", "vit"):
                found.setdefault(str(settings), settings)
    return list(found.values())


def test_every_size_with_a_config_comes_back_whole(monkeypatch):
    """Names and shapes, of every project that has it, without memory; those that transformers has not are known."""
    refused, blank = 0, foreign._blank
    made = {}  # an encoder for each size, not for each project

    def once(settings):
        return made[str(settings)] if str(settings) in made else made.setdefault(str(settings), blank(settings))

    monkeypatch.setattr(foreign, "_blank", once)
    monkeypatch.setattr("timm.layers.trunc_normal_", lambda *_, **__: None)  # slow on tensors without values
    for settings in all_models():
        with torch.device("meta"):
            own = weights_of(create_encoder(settings))
        for name, project in PROJECTS.items():
            if not project.fits(settings):
                continue
            if name == "huggingface" and why_not_huggingface(settings):
                refused += 1
                continue
            back = encoder_in(project.write(own), Said(settings, {}, [], True))
            shapes = {key: value.shape for key, value in own.items()}
            assert {key: value.shape for key, value in back.tensors.items()} == shapes, (settings, name)
            assert all(row.becomes for row in back.rows)
    assert 0 < refused < len(all_models()) / 2


def microsofts(name="swinv2", pretrained=4):
    """A classifier of Swin-Transformer's code with the buffers that it stores, of 64 px and windows of 8 and 4."""
    settings = dict(SWIN, name=name, img_size=32, window_size=8)
    encoder = built(settings | ({"pretrained_window_size": pretrained} if name == "swinv2" else {}))
    tensors = PROJECTS["swin"].write(weights_of(encoder))
    tensors |= {"head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}
    for stage, window in enumerate((8, 4)):
        start = f"layers.{stage}.blocks.0.attn."
        tensors[f"{start}relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.int64)
        offsets = torch.arange(1 - window, window) / (pretrained - 1) * 8
        axis = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
        if name == "swinv2":
            table = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)[None]
            tensors[f"{start}relative_coords_table"] = table
    tensors["layers.0.blocks.1.attn_mask"] = torch.zeros(1, 64, 64)
    return encoder, tensors


def test_a_classifier_of_microsofts_says_what_it_is(tmp_path, capsys):
    encoder, tensors = microsofts()
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": wrapped, "epoch": 3}, tmp_path / "a.pth")
    argv = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--report", str(tmp_path / "r.csv")]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "read as swin's, under model: " in out and "not read: epoch" in out
    assert "left out 5 tensors (layers.0.blocks.0.attn.relative_position_index, …): made anew from the sizes" in out
    assert "left out 2 tensors (head.weight, …): head" in out
    assert "model.img_size=32 follows from the windows" in out
    same(tmp_path / "b.safetensors", encoder)
    with safe_open(tmp_path / "b.safetensors", framework="pt") as opened:
        said = json.loads(opened.metadata()["encoder"])
    wanted = {"img_size": 32, "window_size": 8, "pretrained_window_size": [4, 4], "depths": [2, 2], "mlp_ratio": 4.0}
    assert {key: said[key] for key in wanted} == wanted
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == len(tensors) and {"name", "becomes", "left out because"} < rows[0].keys()
    assert next(r for r in rows if "downsample.norm.w" in r["name"])["becomes"] == "layers.1.downsample.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.1.blocks.0.mlp.fc1.bias"), "1 missing (layers.1.blocks.0.mlp.fc1.bias)"),
        (lambda t: t.update(extra=torch.zeros(3)), "1 unknown (extra)"),
        (lambda t: t.update({"norm.weight": torch.zeros(9)}), "norm.weight (9,) against (32,)"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "norm.weight holds numbers that are not finite"),
        (lambda t: t.pop("patch_embed.proj.weight"), "holds no patch_embed.proj.weight"),
        (lambda t: [t.pop(k) for k in list(t) if "relative" in k], "model.window_size: the file does not tell it"),
    ],
)
def test_what_does_not_fit_is_named(change, words, tmp_path):
    _, tensors = microsofts()
    change(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        convert_any(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert str(error.value).startswith(str(tmp_path / "a.pth")) and words in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "b.safetensors").exists()


def test_the_student_and_what_the_file_does_not_say_can_be_given(tmp_path):
    teacher, student = (built(PLAIN | {"img_size": 64}) for _ in range(2))
    student.norm.weight.add_(1)
    content = {who: {f"module.{name}": t for name, t in PROJECTS["dino"].write(weights_of(one)).items()}
               for who, one in (("teacher", teacher), ("student", student))}  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    given = {"num_heads": 3}
    for flag, encoder in ((False, teacher), (True, student)):
        foreign = convert_any(tmp_path / "a.pth", tmp_path / "b.safetensors", given=given, student=flag).foreign
        same(tmp_path / "b.safetensors", encoder)
        assert foreign.settings["num_heads"] == 3 and not foreign.notes
    assert read_encoder(tmp_path / "a.pth").notes[0].startswith("model.num_heads=1 is a guess")
    with pytest.raises(ValueError, match="--from huggingface: its names are those of dino"):
        read_encoder(tmp_path / "a.pth", project="huggingface")


class Trap:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('owned').touch()",))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trap.pth", "b.safetensors"], "trap.pth: not a readable weight file"),
        (["none.pth", "b.safetensors"], "none.pth: no such weight file"),
        (["empty", "b.safetensors"], "empty: no encoder there"),
        (["a.safetensors", "b.pth"], "b.pth: for whom? give --to"),
        (["a.safetensors", "b.bin"], "b.bin: must end in .safetensors"),
        (["a.safetensors", "b", "--to", "mae"], "--to mae writes a file"),
        (["a.safetensors", "b.pth", "--to", "huggingface"], "--to huggingface writes a folder"),
        (["a.safetensors", "b.pth", "--to", "mae"], "facebookresearch/mae has no such vit"),
        (["a.safetensors", "b.pth", "--to", "clip"], "--to clip: unknown; use one of fastmim, timm"),
        (["a.safetensors", "b.safetensors", "--from", "clip"], "--from clip: unknown"),
        (["a.safetensors", "b.safetensors", "--student"], "--student: there is no student in it"),
        (["a.safetensors", "b.safetensors", "--whole"], "--whole: a.safetensors is no run"),
        (["a.safetensors", "b.safetensors", "optim.lr=1"], "optim.lr: convert takes model.name"),
        (["a.safetensors", "b.safetensors", "model.name=swin"], "num_heads=3: must list one number per stage"),
    ],
)
def test_each_mistake_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("trap.pth").write_bytes(pickle.dumps({"model": Trap()}))
    Path("empty").mkdir()
    save_file(weights_of(built(VIT | {"rel_pos_bias": True, "img_size": 32})), "a.safetensors",
              header(VIT | {"rel_pos_bias": True, "img_size": 32}))  # fmt: skip
    assert cli.main(["convert", *argv]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert not Path("owned").exists() and not any(Path(name).exists() for name in ("b", "b.pth", "b.safetensors"))
