"""What the engine's tests share: a folder of small pictures, a tiny model, and how to describe a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """22 smooth pictures: not a multiple of any batch used, so that epochs end inside a run."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(22):
        coarse = generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """23 pictures of two classes, one lighter than the other: an odd number, for two ranks."""
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(1)
    for i in range(23):
        coarse = generator.integers(90 * (i % 2), 150 + 90 * (i % 2), (4, 4, 3), dtype=np.uint8)
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((40, 48), Image.Resampling.BICUBIC).save(folder / "ab"[i % 2] / f"{i:02d}.png")
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
            "output.loggers": [],
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
    load_config = pytest.importorskip("fastmim.config", exc_type=ImportError).load_config
    return lambda out, **changes: load_config(None, overrides(out, **changes))


@pytest.fixture(scope="session")
def zero_run(pictures):
    """Overrides of a tiny run for ZeRO: the same global batch of 8 on any number of ranks."""

    def describe(out, ranks, **changes) -> list[str]:
        keys = {f"model.{key}": list(v) if isinstance(v, tuple) else v for key, v in ENCODER.items()}
        keys |= {
            "model.drop_path_rate": 0.0,  # its draws belong to ranks
            "objective.unit": 8,
            "data.path": pictures,
            "data.num_workers": 0,
            "optim.lr": 1e-2,
            "optim.lr_batch": "null",
            # Adam divides by the root of the second moment. With the usual 1e-8 a gradient that is nothing but
            # rounding (some are zero in theory) becomes a full step, and 1 and 2 ranks could not be compared.
            "optim.eps": 1e-3,
            "optim.clip_grad": 0.5,
            "train.steps": 10,
            "train.micro_batch_size": 8 // ranks,
            "train.global_batch_size": 8,
            "train.log_every": 1,
            "output.dir": out,
            "output.loggers": "[]",
            "output.pictures": 0,
        }
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={'null' if value is None else value}" for key, value in keys.items()]

    return describe


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Trains a list of runs on some ranks: ``launch(runs, ranks)``; returns what the first launcher wrote as errors.

    ``fails`` expects that the launch does; ``kill_in`` lets the last rank die in that step; ``nodes`` starts as
    many launchers, with ``ranks`` each, that find each other on the loopback device; ``worker`` is the program.
    """
    pytest.importorskip("deepspeed")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }

    def run(runs, ranks, *, fails=False, kill_in=None, nodes=1, worker="zero_worker.py"):
        file = tmp_path_factory.mktemp("launch") / "runs.json"
        file.write_text(json.dumps(runs))
        launcher = []
        if nodes > 1:
            where = ["--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
            launcher = ["-m", "torch.distributed.run", *where, "--nproc_per_node", str(ranks)]
        elif ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launcher, str(Path(__file__).with_name(worker)), str(file)]
        command += [] if kill_in is None else [str(kill_in)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started = [subprocess.Popen(command, **pipes) for _ in range(nodes)]
        ended = [(process, process.communicate(timeout=400)[1]) for process in started]
        for process, errors in ended:
            assert (process.returncode != 0) == (fails or kill_in is not None), errors[-4000:]
        return ended[0][1]

    return run


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
