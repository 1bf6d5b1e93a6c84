"""Several ranks that disagree or fail alone: one line each, from the command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastmim.engine.metrics import read_rows

ROOT = Path(__file__).parents[2]
BATCH = {"train__steps": 2, "train__micro_batch_size": 2, "data__num_workers": 0}


@pytest.fixture
def ranks(tmp_path):
    """Runs ``fastmim pretrain`` as one process a list of overrides; gives (status, lines of standard error) of each."""
    config = tmp_path / "empty.yaml"
    config.write_text("{}\n")

    def run(requests, environments=None, timeout=400):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, size = str(free.getsockname()[1]), str(len(requests))
        started = []
        for rank, request in enumerate(requests):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
            own = environments[rank] if environments else own
            paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
            env = os.environ | paths | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | own
            command = [sys.executable, "-m", "fastmim", "pretrain", str(config), *request]
            pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
            started.append(subprocess.Popen(command, env=env, **pipes))
        ended = [(process.communicate(timeout=timeout)[1], process.returncode) for process in started]
        return [(status, [line for line in text.splitlines() if "fastmim:" in line or "Traceback" in line
                          or "Warning" in line]) for text, status in ended]  # fmt: skip

    return run


def errors(lines):
    return [line for line in lines if "error" in line or "Traceback" in line]


def test_an_error_of_one_rank_is_said_with_its_rank(ranks, overrides, tmp_path):
    good = overrides(tmp_path / "run", **BATCH)
    bad = overrides(tmp_path / "run", **BATCH | {"data__path": "/not/mounted"})
    (status, first), (other_status, other) = ranks([good, bad])
    assert status and other_status == 2
    assert errors(other) == ["fastmim: rank 1: error: data.path=/not/mounted: no such folder; give a folder of images"]
    assert len(errors(first)) == 1 and "rank 1: data.path=/not/mounted" in errors(first)[0]


@pytest.mark.parametrize("key", ["optim.lrr=1", "train.resume=nowhere"])
def test_an_error_of_all_is_said_once(ranks, overrides, tmp_path, key):
    """Found while the config is read, and on the way to the first step."""
    (status, first), (other_status, other) = ranks([[*overrides(tmp_path / "run", **BATCH), key]] * 2)
    assert (status, other_status) == (2, 2)
    assert len(errors(first)) == 1 and key.partition("=")[0] in errors(first)[0]
    assert errors(other) == []


def test_a_mistake_in_one_ranks_config_ends_all(ranks, overrides, tmp_path):
    good = overrides(tmp_path / "run", **BATCH)
    (status, first), (other_status, other) = ranks([good, [*good, "optim.lrr=1"]])
    assert status and other_status == 2
    assert errors(other)[0].startswith("fastmim: rank 1: error: optim.lrr: unknown key")
    assert len(errors(first)) == 1 and "rank 1: optim.lrr" in errors(first)[0]


@pytest.mark.parametrize("what", ["files", "validation", "config"])
def test_what_ranks_must_share_is_compared(ranks, overrides, tmp_path, pictures, what):
    half = tmp_path / "half"
    half.mkdir()
    for path in sorted(pictures.iterdir())[:12]:
        (half / path.name).write_bytes(path.read_bytes())
    one = BATCH | {"data__val_path": pictures}
    changes = {"files": {"data__path": half}, "validation": {"data__val_path": half}, "config": {"optim__lr": 0.5}}
    other = one | changes[what]
    (status, first), (other_status, second) = ranks([overrides(tmp_path / "run", **keys) for keys in (one, other)])
    key = {"files": "data.path: 12 images", "validation": "data.val_path: 12 images", "config": "optim.lr: 0.5"}[what]
    assert (status, other_status) == (2, 2)
    assert len(errors(first)) == 1 and f"error: {key}" in errors(first)[0] and "on rank 1," in errors(first)[0]
    assert errors(second) == [] and not (tmp_path / "run").exists()


LOUD = """
import warnings
from fastmim.objectives.simmim import SimMIM

class Loud(SimMIM):
    def forward(self, images, mask):
        warnings.warn("a library's word")
        return super().forward(images, mask)
"""


@pytest.mark.parametrize("kind", ["slurm", "open_mpi"])
def test_schedulers_start_one_run(ranks, overrides, tmp_path, pictures, kind):
    """Two tasks are two ranks of one run; folders of the same names may lie elsewhere on another machine. What both
    warn of, a library's words too, is said once; nothing else is."""
    (tmp_path / "loud.py").write_text(LOUD)
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path)))}
    loud = BATCH | {"objective__name": "loud:Loud", "optim__warmup_steps": 5}
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in pictures.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    names = {
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        "open_mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    }[kind]
    paths |= {"SLURM_STEP_ID": "0"}
    places = [dict(zip(names, (str(rank), "2", str(rank)), strict=True)) | paths for rank in range(2)]
    requests = [overrides(tmp_path / "run", **loud | {"data__path": path}) for path in (pictures, copy)]
    (status, first), (other_status, other) = ranks(requests, places)
    assert (status, other_status, other) == (0, 0, [])
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert [line.rpartition(": ")[2] for line in first if "Warning" in line] == ["a library's word"]
    assert len([line for line in first if "warning: optim: the run ends at step 2, inside its warm-up" in line]) == 1


def test_a_port_in_use_is_one_line(ranks, overrides, tmp_path):
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(taken.getsockname()[1])}
        ((status, lines),) = ranks([overrides(tmp_path / "run", **BATCH)], [place])
    assert status == 2 and len(errors(lines)) == 1 and "the port is in use; set another MASTER_PORT" in errors(lines)[0]
