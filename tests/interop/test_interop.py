"""Weights from Microsoft and timm, and to timm."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastmim.interop import load_reference, load_timm, load_weights
from fastmim.objectives import create_objective

TINY = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), img_size=64)


def objective_for(name="swinv2", **kwargs):
    encoder = dict(TINY, name=name, window_size=4, **kwargs)
    return create_objective("simmim", encoder=encoder)


def official(objective):
    """The same weights under Microsoft's names and shapes, with the buffers their checkpoints carry."""
    out = {}
    for name, value in objective.state_dict().items():
        if name.startswith("head."):
            value = value[..., None, None] if value.ndim == 2 else value
            name = "decoder.0." + name.removeprefix("head.")
        parts = name.split(".")
        if "downsample" in parts:
            parts[2] = str(int(parts[2]) - 1)
        out[".".join(parts)] = value.clone()
    out["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    out["encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return out


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"model": s, "epoch": 1}, lambda s: {"module." + k: v for k, v in s.items()}],
)
@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_official_checkpoint_round_trip(name, wrap):
    source, target = objective_for(name), objective_for(name)
    report = load_reference(target, wrap(official(source)))
    for (key, ours), theirs in zip(target.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert set(report.names.values()) == {n for n, _ in target.named_parameters()}
    assert len(report.skipped) == 2 and not report.initialised


def test_every_problem_is_named():
    objective = objective_for()
    state = official(objective)
    state["encoder.extra.weight"] = torch.zeros(3)
    del state["encoder.layers.1.downsample.norm.bias"]
    state["encoder.norm.weight"] = torch.zeros(7)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_reference(objective, state)
    for text in ("encoder.extra.weight", "encoder.layers.2.downsample.norm.bias", "encoder.norm.weight (7,)"):
        assert text in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in objective.state_dict().items())


def test_window_mismatch_is_refused():
    swin, other = (
        objective_for("swin"),
        create_objective("simmim", encoder=dict(TINY, name="swin", window_size=2)),
    )
    with pytest.raises(ValueError, match=r"relative_position_bias_table \(49, 1\) against \(9, 1\)"):
        load_reference(other, official(swin))


@pytest.mark.parametrize(
    "name, model, kwargs",
    [
        ("swin", "swin_tiny_patch4_window7_224", {}),
        ("swinv2", "swinv2_tiny_window8_256", {}),
        (
            "vit",
            "beit_base_patch16_224",
            dict(use_shared_rel_pos_bias=True, use_rel_pos_bias=False, init_values=0.1),
        ),
    ],
)
def test_export_is_taken_by_timm_as_it_is(name, model, kwargs, tmp_path):
    if name == "vit":
        encoder = dict(
            name="vit",
            img_size=64,
            embed_dim=48,
            depth=2,
            num_heads=3,
            init_values=0.1,
            shared_rel_pos_bias=True,
        )
        kwargs |= dict(embed_dim=48, depth=2, num_heads=3, img_size=64, global_pool="token")
    else:
        encoder = dict(TINY, name=name, window_size=4)
        kwargs |= dict(TINY, window_size=4)
    objective = create_objective("simmim", encoder=encoder).eval()
    path = tmp_path / "encoder.safetensors"
    save_file({k: v for k, v in objective.encoder.state_dict().items() if k != "mask_token"}, path)
    theirs = timm.create_model(model, num_classes=0, **kwargs).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    images = torch.randn(2, 3, 64, 64)
    expected = theirs.forward_features(images)
    if name == "vit":
        expected = expected[:, 1:].unflatten(1, (4, 4))
    torch.testing.assert_close(objective.encoder(images), expected, rtol=1e-4, atol=1e-5)
    again = create_objective("simmim", encoder=encoder)
    assert load_weights(again, path).initialised == ["encoder.mask_token", "head.weight", "head.bias"]
    assert torch.equal(again.encoder.norm.weight, objective.encoder.norm.weight)


def test_real_timm_name_loads_strictly():
    """The promise of the documentation, on the full-size model by name."""
    with torch.device("meta"):  # names and shapes are all that strictness is about
        objective = create_objective("simmim", encoder={"name": "swinv2_base"})
        state = {k: v for k, v in objective.encoder.state_dict().items() if k != "mask_token"}
        model = timm.create_model("swinv2_base_window12_192", num_classes=0)
    missing, unexpected = model.load_state_dict(state, strict=True, assign=True)
    assert not missing and not unexpected


def test_timm_classifier_is_left_out_and_reported():
    theirs = timm.create_model("swinv2_tiny_window8_256", num_classes=10, **TINY, window_size=4)
    report = load_timm(objective_for(), theirs.state_dict())
    assert report.skipped == ["head.fc.bias", "head.fc.weight"]
    with pytest.raises(ValueError, match="missing"):
        load_timm(objective_for(), {k: v for k, v in theirs.state_dict().items() if "layers.3" not in k})


def test_load_weights_knows_each_kind(tmp_path):
    source = objective_for()
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "own.safetensors")
    torch.save({"model": official(source)}, tmp_path / "microsoft.pth")
    for file in ("own.safetensors", "microsoft.pth"):
        target = objective_for()
        assert not load_weights(target, tmp_path / file).initialised
        assert torch.equal(target.head.weight, source.head.weight)


def test_untrusted_files_do_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("import pathlib; pathlib.Path('owned').touch()",))

    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"model": Trap()}))
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for file, message in [
        ("trap.pth", "not a readable weight file"),
        ("text.safetensors", "not a readable"),
        ("other.safetensors", "neither a SimMIM"),
        ("none.pth", "no such weight file"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_weights(objective_for(), tmp_path / file)
        assert "\n" not in str(error.value)
