"""A whole run on each source and loader: the loader changes pixels by rounding only, and a restart nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fastmim.data import pack_images
from fastmim.engine.train import train


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_shards_train_as_the_folder_they_were_packed_from(settings, pictures, tmp_path):
    pack_images(pictures, tmp_path / "shards", shard_bytes=20_000)
    train(settings(tmp_path / "a", train__steps=4, data__num_workers=0))
    train(settings(tmp_path / "b", train__steps=4, data__num_workers=0, data__path=tmp_path / "shards"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_dali_trains_and_goes_on_bit_for_bit(settings, pictures, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    pack_images(pictures, tmp_path / "shards", shard_bytes=20_000)
    options = dict(data__path=tmp_path / "shards", data__loader="dali", data__num_workers=1, optim__schedule="constant")
    whole = train(settings(tmp_path / "whole", train__steps=9, **options))
    train(settings(tmp_path / "parts", train__steps=4, **options))
    parts = train(settings(tmp_path / "parts", train__steps=9, **options))
    one, other = load_file(whole.encoder_path), load_file(parts.encoder_path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # another filter at the edges of the crop: the curve is that of the torchvision loader up to rounding
    train(settings(tmp_path / "torchvision", train__steps=4, **options | {"data__loader": "torchvision"}))
    ours = losses(tmp_path / "whole")[:4]
    assert ours == pytest.approx(losses(tmp_path / "torchvision"), rel=0.02)


def test_synthetic_images_need_no_folder(settings, tmp_path):
    result = train(settings(tmp_path, train__steps=2, data__path=None, data__loader="synthetic", output__pictures=2))
    assert len(losses(tmp_path)) == 2 and not result.bad_files
