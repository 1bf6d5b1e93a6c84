"""What the engine's tests share: a folder of small pictures, a tiny model, and how to describe a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.config import load_config
from fastmim.objectives import create_objective

# Two stages of one block with a shift, 32 px in patches of 4: every kind of parameter, milliseconds per step.
ENCODER = {
    "name": "swinv2",
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
    "window_size": 4,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors gain nothing from threads, and lose much where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """22 smooth pictures: not a multiple of any batch used, so that epochs end inside a run."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(22):
        coarse = generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def new_objective():
    """Builds a small SwinV2 objective from a seed."""

    def build(seed=0, **changes):
        torch.manual_seed(seed)
        return create_objective("simmim", encoder=ENCODER | changes, unit=8)

    return build


@pytest.fixture
def objective(new_objective):
    """A small SwinV2 objective with known weights."""
    return new_objective()


@pytest.fixture
def overrides(pictures):
    """Overrides of a tiny run into a folder; keyword arguments replace single keys (``train__steps=3``)."""

    def describe(out, **changes) -> list[str]:
        encoder = {f"model.{key}": value for key, value in ENCODER.items()}
        keys = encoder | {
            "model.drop_path_rate": 0.2,
            "objective.unit": 8,
            "data.path": pictures,
            "data.num_workers": 2,
            "optim.lr": 1e-2,
            "train.steps": 12,
            "train.micro_batch_size": 4,
            "train.log_every": 1,
            "output.dir": out,
            "output.tensorboard": False,
            "output.pictures": 0,
        }
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        values = {
            key: list(v) if isinstance(v, tuple) else "null" if v is None else v for key, v in keys.items()
        }
        return [f"{key}={value}" for key, value in values.items()]

    return describe


@pytest.fixture
def settings(overrides):
    """The same as a checked config."""
    return lambda out, **changes: load_config(None, overrides(out, **changes))
