"""Encoders as ONNX files, run by ONNX Runtime for batches that the exporter has not seen."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from safetensors.torch import save_file

from fastmim import cli
from fastmim.engine import onnx_file
from fastmim.interop.facts import header
from fastmim.models import create_encoder

STAGES = dict(embed_dim=8, patch_size=4)
# A map that shifted windows do not divide, a map that is merged, and a ViT with all that it can have.
CASES = {
    "swin": dict(STAGES, name="swin", img_size=(44, 36), window_size=4, in_chans=1, depths=(2,), num_heads=(2,)),
    "swinv2": dict(STAGES, name="swinv2", img_size=32, window_size=4, depths=(1, 1), num_heads=(1, 2)),
    "vit": dict(name="vit", embed_dim=16, depth=1, num_heads=2, img_size=32, abs_pos_embed=True, init_values=0.1,
                shared_rel_pos_bias=True),
}  # fmt: skip


def stored(settings, folder):
    torch.manual_seed(0)
    encoder = create_encoder(settings, impl="reference").eval().requires_grad_(False)
    for param in encoder.parameters():
        param.add_(torch.randn_like(param) * 0.1)
    weights = {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}
    save_file(weights, folder / "encoder.safetensors", header(settings, {"mean": [0.4], "std": [0.2]}))
    return encoder


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_onnx_runtime_computes_the_same_for_any_batch(case, tmp_path, capsys):
    import onnx
    import onnxruntime

    encoder = stored(CASES[case], tmp_path)
    assert cli.main(["convert", str(tmp_path / "encoder.safetensors"), str(tmp_path / "e.onnx")]) == 0
    out = capsys.readouterr().out
    said = float(out.partition("ONNX Runtime's results differ by at most ")[2].split()[0])
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, encoder.in_chans, *encoder.img_size)
    cls, maps = encoder.forward_tokens(images)
    pooled, tokens = session.run(["pooled", "tokens"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(pooled), cls, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(tokens), maps, rtol=1e-4, atol=1e-4)
    assert 0 < said < 1e-4
    told = {one.key: one.value for one in onnx.load(tmp_path / "e.onnx").metadata_props}
    assert json.loads(told["statistics"])["mean"] == [0.4] and json.loads(told["encoder"])["name"] == case
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.onnx", "encoder.safetensors"]


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch, capsys):
    stored(CASES["vit"], tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = ["convert", "encoder.safetensors", "e.onnx"]
    with monkeypatch.context() as here:
        here.setattr(onnx_file, "_MOST_BYTES", 10)
        assert cli.main(argv) == 2
        assert "GB of weights: an ONNX file holds less than 2 GB" in capsys.readouterr().err
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(argv) == 2
    line = capsys.readouterr().err
    assert "ONNX needs onnxruntime: " in line and "[onnx]" in line and line.count("\n") == 1
    assert not (tmp_path / "e.onnx").exists()


@torch.no_grad()
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    settings = CASES["vit"]
    encoder = stored(settings, tmp_path)
    weights = {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}

    class Program:
        """In place of the exporter's: its file has another norm."""

        def __init__(self, model):
            self.model = type("Model", (), {"metadata_props": {}})()
            model.encoder.norm.bias.add_(1e-3)

        def save(self, path):
            open(path, "wb").close()

    session = type("Session", (), {"run": lambda self, names, images: [one.numpy() for one in wrong(images)]})

    def wrong(images):
        return encoder.forward_tokens(torch.from_numpy(images["images"]))

    monkeypatch.setattr(torch.onnx, "export", lambda model, *_, **__: Program(model))
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: session())
    with pytest.raises(ValueError, match="ONNX Runtime's results differ by 1.0e-03: not written"):
        onnx_file.export_onnx(weights, settings, tmp_path / "e.onnx", metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]
