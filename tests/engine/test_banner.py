"""What a run says before its first step, and when it is done: counts as they are, and the held-out images."""

from __future__ import annotations

import re

import pytest
import torch

from fastmim.engine.banner import start_rows
from fastmim.engine.distributed import World
from fastmim.engine.local import LocalEngine
from fastmim.engine.train import train


@pytest.mark.parametrize(
    ("held_out", "said"), [(None, "none"), (1, "1, for the validation"), (12345, "12,345, for the validation")]
)
def test_the_held_out_images_stand_behind_those_that_are_trained_on(held_out, said, tmp_path):
    net = torch.nn.Linear(1, 1)
    rows = start_rows(
        engine=LocalEngine(net, torch.optim.SGD(net.parameters())),
        world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
        model="vit",
        kernels="torch",
        images=22,
        held_out=held_out,
        steps_per_epoch=5,
        global_batch=4,
        start=0,
        total=10,
        folder=tmp_path,
    )
    at = rows.index(("images", "22, 5 steps an epoch"))
    assert rows[at + 1 : at + 3] == [("held out", said), ("batch", "4 images a step")] and rows[0][0] == "model"


def test_a_run_of_one_step_of_one_image(settings, tmp_path, capsys, pictures):
    (tmp_path / "held").mkdir()
    for name in ("00.png", "01.png", "02.png"):
        (tmp_path / "held" / name).write_bytes((pictures / name).read_bytes())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/05.png").write_bytes((pictures / "05.png").read_bytes())
    how = dict(data__path=tmp_path / "images", train__steps=1, train__micro_batch_size=1, data__num_workers=0)
    train(settings(tmp_path / "run", data__val_path=tmp_path / "held", **how))
    told = capsys.readouterr().out
    rows = dict(re.findall(r"^  (held out|[a-z]+) +(.*)$", told, re.MULTILINE))
    assert (rows["images"], rows["held out"]) == ("1, 1 step an epoch", "3, for the validation")
    assert (rows["batch"], rows["length"]) == ("1 image a step", "1 step (1 epoch)")
    assert " done: 1 step, loss" in told


def test_a_share_that_is_held_out_is_counted(settings, tmp_path, capsys):
    train(settings(tmp_path, data__val_fraction=0.3, train__steps=1, data__num_workers=0))
    rows = dict(re.findall(r"^  (held out|images) +([0-9]+),", capsys.readouterr().out, re.MULTILINE))
    assert int(rows["images"]) + int(rows["held out"]) == 22 and int(rows["held out"]) > 0
