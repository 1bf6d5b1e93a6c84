"""Weight files as other programs write them: what lies beside the weights is not run, and what wraps them is known."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import json
import logging
import os
import pathlib
import re
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmim.interop import load_weights
from fastmim.objectives import create_objective

ENCODER = dict(name="swinv2", img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)


def new(**changes):
    return create_objective("simmim", encoder=ENCODER | changes, unit=8)


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(5)
    return new()


@pytest.fixture(scope="module")
def whole(source):
    return {name: value.clone() for name, value in source.state_dict().items()}


@pytest.fixture(scope="module")
def encoder(source):
    return {name: value.clone() for name, value in source.encoder.state_dict().items() if name != "mask_token"}


def same_encoder(objective, source):
    pairs = zip(objective.encoder.named_parameters(), source.encoder.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for (name, ours), theirs in pairs if name != "mask_token")


class Kind(enum.Enum):
    ONE = 1


class Slotted:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 1


class Node(dict):
    """As yacs, addict and easydict have them: a dictionary with attributes."""


class Items(list):
    pass


def other_program(value):
    node = Node(a=value, b=Node(c=value))
    node.frozen = True
    return node


BESIDE = {
    "a dictionary with attributes": other_program(1),
    "a namespace": argparse.Namespace(lr=1, out=pathlib.PurePosixPath("/a")),
    "numpy numbers": [np.float64(0.3), np.int64(2), np.float32(1), np.bool_(True)],
    "a numpy array": np.arange(3.0),
    "a path": pathlib.Path("a/b"),
    "an enum": Kind.ONE,
    "an enum as key": {Kind.ONE: 1},
    "a default dictionary": collections.defaultdict(list, {1: [2]}),
    "a list of a class": Items([1, 2]),
    "a time": datetime.datetime(2020, 1, 1),
    "slots": Slotted(),
    "a function": os.path.join,
    "a set of numbers": {np.float64(1), np.float64(2)},
}


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
@pytest.mark.parametrize("beside", BESIDE)
def test_objects_beside_the_weights_are_passed_over(source, whole, tmp_path, beside, form):
    torch.save({"model": whole, "epoch": 3, "extra": BESIDE[beside]}, tmp_path / "a.pth", **form)
    target = new()
    report = load_weights(target, tmp_path / "a.pth")
    assert same_encoder(target, source) and torch.equal(target.head.weight, source.head.weight)
    assert {"epoch", "extra"} <= set(report.not_read)


def test_a_module_that_is_not_installed(source, whole, tmp_path, monkeypatch):
    yacs = types.ModuleType("yacs_elsewhere")
    node = type("CfgNode", (dict,), {"__module__": "yacs_elsewhere"})
    yacs.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs_elsewhere", yacs)
    torch.save({"model": whole, "config": node(A=node(B=1))}, tmp_path / "a.pth")
    monkeypatch.delitem(sys.modules, "yacs_elsewhere")
    report = load_weights(target := new(), tmp_path / "a.pth")
    assert same_encoder(target, source)
    assert "yacs_elsewhere.CfgNode" in report.not_read


class Trap:
    """Would touch a file in the working directory."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class StateTrap:
    """Would set an attribute on a function that rebuilds tensors."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (), (None, {"owned": 1})


TRAPS = {
    "exec": Trap(exec, "import pathlib; pathlib.Path('owned').touch()"),
    "system": Trap(os.system, "touch owned"),
    "open": Trap(open, "owned", "w"),
    "getattr": Trap(getattr, Trap(__import__, "os"), "system"),
}


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_runs(source, whole, tmp_path, monkeypatch, trap, form):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": whole, "args": TRAPS[trap]}, "beside.pth", **form)
    assert same_encoder(target := new(), source) is False
    load_weights(target, "beside.pth")
    assert same_encoder(target, source)
    torch.save({"model": {**whole, "head.bias": TRAPS[trap]}}, "instead.pth", **form)
    with pytest.raises(ValueError, match=r"instead\.pth: .*head\.bias \(a .*not run") as error:
        load_weights(new(), "instead.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_a_file_cannot_change_the_functions_that_read_it(whole, tmp_path):
    torch.save({"model": whole, "args": StateTrap()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="not a readable weight file"):
        load_weights(new(), tmp_path / "a.pth")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "owned")


def test_a_script_is_not_a_weight_file(tmp_path):
    torch.save(Slotted(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.writestr("a/constants.pkl", b"")  # by which torch knows one
    with pytest.raises(ValueError, match="not a readable weight file"):
        load_weights(new(), tmp_path / "a.pt")


WRAPPED = {
    "_orig_mod.": lambda s: {"_orig_mod." + k: v for k, v in s.items()},
    "module._orig_mod.": lambda s: {"model": {"module._orig_mod." + k: v for k, v in s.items()}},
    "encoder._orig_mod.": lambda s: {"encoder._orig_mod." + k: v for k, v in s.items()},
    "encoder.": lambda s: {"model": {"encoder." + k: v for k, v in s.items()}},
    "backbone.": lambda s: {"state_dict": {"backbone." + k: v for k, v in s.items()}},
    "model.": lambda s: {"state_dict": {"model." + k: v for k, v in s.items()}, "optimizer_states": [{}]},
    "model.backbone.": lambda s: {"state_dict": {"model.backbone." + k: v for k, v in s.items()}},
    "teacher": lambda s: {"teacher": {"backbone." + k: v for k, v in s.items()}, "epoch": 1},
    "student": lambda s: {"student": {"module.backbone." + k: v for k, v in s.items()}},
    "teacher before student": lambda s: {
        "student": {k: v + 1 for k, v in s.items()}, "teacher": s, "optimizer": {"state": {0: {"m": torch.ones(1)}}}
    },
    "teacher. before student.": lambda s: {
        "state_dict": {"student." + k: v + 1 for k, v in s.items()} | {"teacher." + k: v for k, v in s.items()}
    },
    "model_ema": lambda s: {"model_ema": s, "model": {k: v + 1 for k, v in s.items()}},
    "state_dict_ema": lambda s: {"state_dict_ema": s, "arch": "x"},
    "model.state_dict": lambda s: {"model": {"state_dict": s}},
    "a key that nobody knows": lambda s: {"weights_of_it": s, "epoch": 1},
    "heads beside": lambda s: {"backbone." + k: v for k, v in s.items()} | {"projector.weight": torch.ones(2)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off(source, encoder, tmp_path, kind, caplog):
    torch.save(WRAPPED[kind](encoder), tmp_path / "a.pth")
    target = new()
    with caplog.at_level(logging.INFO, "fastmim"):
        report = load_weights(target, tmp_path / "a.pth")
    assert same_encoder(target, source)
    assert report.initialised == ["encoder.mask_token", "head.weight", "head.bias"]
    assert f"{len(encoder)} tensors loaded" in caplog.text and "3 new (encoder.mask_token" in caplog.text
    if kind == "heads beside":
        assert report.skipped == ["projector.weight"] and "1 skipped (projector.weight)" in caplog.text


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module.model.", "teacher."])
def test_a_whole_objective_under_a_prefix(source, whole, tmp_path, prefix):
    torch.save({"state_dict": {prefix + k: v for k, v in whole.items()}}, tmp_path / "a.pth")
    report = load_weights(target := new(), tmp_path / "a.pth")
    assert torch.equal(target.head.weight, source.head.weight) and not report.initialised


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"model": {**s, "norm.bias": argparse.Namespace(a=1)}}, r"\(a argparse\.Namespace\) inside model"),
        (lambda s: {"model": Slotted()}, r"expected tensors by name, got a .*Slotted inside model"),
        (lambda s: Slotted(), r"expected tensors by name, got a .*Slotted"),
        (lambda s: [s], "got a list"),
        (lambda s: {"a": s, "b": s}, "expected tensors by name"),
        (lambda s: {f"{part}.{k}": v for part in "ab" for k, v in s.items()}, r"encoders under 'a\.', 'b\.'"),
        (lambda s: {**s, "module.norm.bias": s["norm.bias"]}, "twice"),
        (lambda s: {k: v.int() for k, v in s.items()}, "expected floating-point weights"),
        (lambda s: {**s, "norm.bias": s["norm.bias"] / 0}, r"norm\.bias holds numbers that are not finite"),
        (lambda s: {}, "got nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(encoder, tmp_path, content, message):
    torch.save(content(encoder), tmp_path / "a.pth")
    before = (target := new()).state_dict()["encoder.norm.bias"].clone()
    with pytest.raises(ValueError, match=message) as error:
        load_weights(target, tmp_path / "a.pth")
    assert str(error.value).startswith(str(tmp_path / "a.pth")) and "\n" not in str(error.value)
    assert torch.equal(before, target.encoder.norm.bias)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "a.pth"
    {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(ValueError, match="not a regular file"):
        load_weights(new(), path)


def exported(tmp_path, weights, **facts):
    metadata = {key: value if key == "version" else json.dumps(value) for key, value in facts.items()}
    save_file(weights, tmp_path / "a.safetensors", metadata)
    return tmp_path / "a.safetensors"


LARGER = dict(img_size=64, window_size=8)


def test_another_window_is_refused_until_the_trained_one_is_said(encoder, tmp_path, caplog):
    path = exported(tmp_path, encoder, encoder=ENCODER)
    with pytest.raises(ValueError, match=r"windows of 4 tokens.*gives 8.*model\.pretrained_window_size=4 to keep"):
        load_weights(new(**LARGER), path)
    load_weights(new(**LARGER, pretrained_window_size=4), path)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    load_weights(new(**LARGER, pretrained_window_size=8), path)
    assert "windows of 4 tokens, not of 8" in caplog.text


def test_the_coordinates_of_the_window_are_kept_by_what_the_message_says(source, encoder, tmp_path):
    path = exported(tmp_path, encoder, encoder=ENCODER)
    load_weights(larger := new(**LARGER, pretrained_window_size=4), path)
    encoders = (source.encoder, larger.encoder)
    small, large = (one.shared.position_bias([block.attn for block in one.all_blocks()])[0] for one in encoders)
    # Token 0 to its right neighbour, in windows of 4 × 4 and of 8 × 8.
    torch.testing.assert_close(small[0, 0, 1], large[0, 0, 1])


def test_a_smaller_map_shrinks_the_window_and_is_another_window(encoder, tmp_path):
    path = exported(tmp_path, encoder, encoder=ENCODER)
    with pytest.raises(ValueError, match=r"pretrained_window_size=4 to keep them, or \[4, 2\]"):
        load_weights(new(img_size=16), path)


def microsoft_table(window, pretrained):
    """As microsoft/Swin-Transformer's models/swin_transformer_v2.py computes it."""
    offsets = torch.arange(-(window - 1), window, dtype=torch.float32)
    table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)[None] / (pretrained - 1) * 8
    return table.sign() * torch.log2(table.abs() + 1.0) / np.log2(8)


@pytest.mark.parametrize(("window", "pretrained", "fits"), [(4, 4, True), (4, 6, False), (8, 4, True), (8, 8, False)])
def test_the_tables_in_microsofts_files_say_the_window(encoder, tmp_path, window, pretrained, fits):
    tables = {
        f"layers.{stage}.blocks.0.attn.relative_coords_table": microsoft_table(window, pretrained) for stage in (0, 1)
    }
    torch.save({"model": encoder | tables}, tmp_path / "a.pth")
    if fits:
        assert sorted(load_weights(new(), tmp_path / "a.pth").skipped) == sorted(tables)
    else:
        with pytest.raises(ValueError, match=f"pretrained_window_size={pretrained} to keep"):
            load_weights(new(), tmp_path / "a.pth")


def test_another_architecture_is_said_in_its_own_words(encoder, tmp_path):
    path = exported(tmp_path, encoder, encoder=ENCODER)
    with pytest.raises(ValueError, match=r"weights of a swinv2; set model\.name"):
        load_weights(new(name="swin"), path)
    with pytest.raises(ValueError, match=r"model\.depths=\[2, 1\], the file's is \[1, 1\]"):
        load_weights(new(depths=(2, 1)), path)


def test_heads_that_no_shape_tells_apart(tmp_path):
    vit = dict(name="vit", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, abs_pos_embed=True)
    weights = create_objective("simmim", encoder=vit, unit=8).encoder.state_dict()
    path = exported(tmp_path, {k: v for k, v in weights.items() if k != "mask_token"}, encoder=vit)
    with pytest.raises(ValueError, match=r"model\.num_heads=3, the file's is 2"):
        load_weights(create_objective("simmim", encoder=vit | {"num_heads": 3}, unit=8), path)


def test_other_statistics_and_another_version_are_said(encoder, tmp_path, caplog):
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}
    with caplog.at_level(logging.INFO, "fastmim"):
        load_weights(new(), exported(tmp_path, encoder, encoder=ENCODER, statistics=statistics, version="0.0.1"))
    assert "normalised by mean [0.5, 0.5, 0.5]" in caplog.text and "data.mean=[0.485" in caplog.text
    assert "normalised by std" not in caplog.text and "written by fastmim 0.0.1" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"name": 3}', "[" * 100_000, '{"name": "swinv9"}', "null"])
def test_a_header_that_says_nothing_useful_is_passed_over(source, encoder, tmp_path, text):
    save_file(encoder, tmp_path / "a.safetensors", {"encoder": text, "statistics": text})
    load_weights(target := new(), tmp_path / "a.safetensors")
    assert same_encoder(target, source)


@pytest.mark.parametrize(
    ("said", "own", "size", "expected"),
    [
        ({}, "default", 44, "shifted before they were padded.*model.policy=parity keeps that"),
        ({"policy": "parity"}, "default", 52, "model.policy=parity keeps that"),
        ({"policy": "default"}, "parity", 44, "padded before they were shifted.*model.policy=default keeps that"),
        ({}, "parity", 44, ""),
        ({"policy": "default"}, "default", 44, ""),
        ({}, "default", 48, ""),  # maps of 12 and 6: the same under both
        ({"policy": ["parity"]}, "default", 44, ""),
        ({"img_size": "wide"}, "default", 44, ""),
    ],
)
def test_another_order_of_padding_and_shift_is_said(tmp_path, caplog, said, own, size, expected):
    kind = ENCODER | dict(img_size=size, depths=(2, 1), name="swin")
    weights = create_objective("simmim", encoder=kind, unit=4).encoder.state_dict()
    path = exported(tmp_path, {k: v for k, v in weights.items() if k != "mask_token"}, encoder=kind | said)
    load_weights(create_objective("simmim", encoder=kind | {"policy": own}, unit=4), path)
    found = " ".join(record.getMessage() for record in caplog.records)
    assert re.search(expected, found) if expected else "model.policy" not in found
