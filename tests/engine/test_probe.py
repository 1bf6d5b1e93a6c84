"""k-NN and RankMe during pretraining, and what ``fastmim probe`` says of the run afterwards."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from fastmim import cli
from fastmim.config import load_config
from fastmim.engine.probe import load_encoder
from fastmim.engine.train import train
from fastmim.evaluate.rank import rankme
from fastmim.objectives import Objective

CONFIGS = {
    "simmim": {},
    # Its teacher is what is looked at, and exported.
    "dino": dict(objective__name="dino", objective__out_dim=8, objective__hidden_dim=8, objective__bottleneck_dim=4,
                 objective__local_crops=0, objective__momentum_teacher=0.5),
}  # fmt: skip


def own_keys(overrides, name):
    return [key for key in overrides if name == "simmim" or not key.startswith("objective.unit")]


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def run(name, overrides, labelled, tmp_path):
    keys = dict(train__steps=4, train__log_every=3, train__probe_every=2, data__num_workers=0, **CONFIGS[name])
    given = own_keys(overrides(tmp_path / "run", data__labelled_path=labelled, **keys), name)
    result = train(load_config(None, given))
    return result, [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def test_what_is_watched_is_what_the_exported_encoder_gives(run, labelled, capsys):
    result, rows = run
    assert [row["step"] for row in rows] == [2, 3, 4]
    assert ["knn_top1" in row for row in rows] == ["rankme" in row for row in rows] == [True, False, True]
    assert result.knn_top1 == rows[-1]["knn_top1"]
    paths = sorted(labelled.rglob("*.png"))
    encoder = load_encoder(result.encoder_path)
    features = torch.cat([plain_features(encoder, path) for path in paths])
    assert rows[-1]["rankme"] == pytest.approx(rankme(features), rel=1e-4)

    argv = ["probe", str(result.output_dir), str(labelled), "--protocol", "beit", "--epochs", "2", "data.num_workers=0"]
    assert cli.main([*argv, "--json", "--untrained"]) == 0
    found = json.loads(capsys.readouterr().out)
    torch.manual_seed(0)
    means = {name: getattr(encoder, name).flatten().tolist() for name in ("mean", "std")}
    new = Objective(encoder=encoder.encoder.settings, **means)
    features = torch.cat([plain_features(new.eval(), path) for path in paths])
    assert found["untrained"]["rankme"] == pytest.approx(rankme(features), rel=1e-4)
    assert found["untrained"]["rankme"] != pytest.approx(found["rankme"], rel=1e-4)
    assert (found["train_images"], found["test_images"], found["classes"], found["pool"]) == (19, 4, 2, "mean")
    assert list(found["knn"]) == ["10", "19"] and found["knn"]["19"]["top1"] == result.knn_top1
    assert found["rankme"] == pytest.approx(rows[-1]["rankme"], rel=1e-4)
    assert [one["features"] for one in found["linear"]] == [0, 1, 2]  # a classifier for each of three blocks
    assert cli.main([*argv, "--augment", "2", "--most", "12", "--pool", "mean", "--untrained"]) == 0
    text, _, new = capsys.readouterr().out.partition("the same encoder untrained, with new weights:\n")
    assert new.count("k-NN") == text.count("k-NN") == 1
    assert "k-NN, k = 10" in text and "RankMe" in text and "2 passes of random crops; the best of 3" in text


def plain_features(objective, path):
    """(1, D): the picture resized to 37 (256/224 of 32), cut in the middle, through the encoder."""
    with Image.open(path) as image:
        pixels = tv.pil_to_tensor(image)
    resized = tv.resize(pixels, [37], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    with torch.no_grad():
        return objective.encoder(objective.normalise(tv.center_crop(resized, [32, 32])[None])).mean((1, 2))


@pytest.mark.parametrize(
    ("source", "rest", "words"),
    [
        ("nowhere", [], "no encoder there; give a run's output folder"),
        ("alien.safetensors", [], "says nothing of its architecture"),
        ("alien.safetensors", ["optim.lr=1"], "optim.lr=1: probe takes data."),
        ("own.safetensors", ["--labels", "none.csv"], "data.labels=none.csv: no such file"),
    ],
)
def test_what_cannot_be_probed_is_one_line(source, rest, words, labelled, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, "alien.safetensors")
    save_file({"x": torch.zeros(1)}, "own.safetensors", {"encoder": '{"name": "vit"}'})
    assert cli.main(["probe", source, str(labelled), *rest]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_rankme_needs_no_labels(settings, tmp_path):
    cfg = settings(tmp_path, train__steps=1, train__probe_every=1, data__val_fraction=0.4, data__num_workers=0)
    row = json.loads((train(cfg).output_dir / "metrics.jsonl").read_text())
    assert row["rankme"] > 1 and "knn_top1" not in row
    with pytest.raises(ValueError, match=r"train.probe_every=1: nothing to probe; give data.labelled_path"):
        settings(tmp_path, train__probe_every=1)
