"""``efficiency.precision`` on a GPU that is not there: torch's answers about it are replaced."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fastmim.config import load_config
from fastmim.engine import build as building
from fastmim.engine.distributed import World

GPU = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
CPU = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Objective(nn.Linear):
    """Stays where it is, whatever device it is sent to."""

    def to(self, device):
        return self


@pytest.fixture(params=[True, False], ids=["ampere", "volta"])
def bf16(request, monkeypatch) -> bool:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or request.param

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(building, "build_objective", lambda cfg: Objective(2, 2))
    return request.param


def asking(precision: str):
    zero = ["efficiency.zero_stage=1"] if precision == "fp16" else []
    return load_config(None, [f"efficiency.precision={precision}", *zero])


def test_auto_is_bf16_only_where_the_gpu_has_it(bf16, caplog):
    with caplog.at_level(logging.INFO, "fastmim"):
        building.make_objective(asking("auto"), GPU)
    assert building.precision_on(asking("auto"), GPU) == ("bf16" if bf16 else "fp32")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (0 if bf16 else 1)
    assert all("Some GPU has no bfloat16" in line and "\n" not in line for line in lines)
    assert all("efficiency.precision=fp16 with efficiency.zero_stage=1" in line for line in lines)


def test_bf16_is_refused_before_anything_is_built(bf16, monkeypatch):
    if bf16:
        assert building.precision_on(asking("bf16"), GPU) == "bf16"
        return
    monkeypatch.setattr(building, "build_objective", lambda cfg: pytest.fail("built"))
    with pytest.raises(ValueError, match="efficiency.precision=bf16: Some GPU has no bfloat16; use fp32, or") as error:
        building.make_objective(asking("bf16"), GPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_others_are_taken_as_they_are(bf16, precision, caplog):
    building.make_objective(asking(precision), GPU)
    assert building.precision_on(asking(precision), GPU) == precision and not caplog.records


def test_on_a_cpu():
    assert building.precision_on(asking("auto"), CPU) == "fp32"
    assert building.precision_on(asking("bf16"), CPU) == "bf16"
