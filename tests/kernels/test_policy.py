"""Which products are made in one pass: by hand-worked sizes, and by a GPU that is asked once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmim_kernels.common import tune
from fastmim_kernels.common.roofs import roofs_of
from fastmim_kernels.linear import policy
from fastmim_kernels.linear.policy import APART, FUSED, one_pass_wins, way, wide_tiles

BF16 = torch.bfloat16
GPU = torch.device("cuda", 0)
RIGHT: dict[str, Any] = {"value": 3.0, "factor": 1.0, "raises": None}


@pytest.mark.parametrize("kernel, breakeven", [
    # A second pass moves 2 maps of 4C values, 4 of them, 3 of C, 1 of 3C, at 0.9 · 3 TB/s. It saves (1/0.65 - 1/0.85)
    # of 8C² FLOPs a row (6C² for the weight of qkv) at 798 TFLOP/s. Both are equal at these C, where all compute.
    ("linear_gelu", 1633), ("gelu_gradient", 3266), ("product_add", 612), ("weight_gradient", 816)])
def test_where_one_pass_stops_to_win(kernel: str, breakeven: int) -> None:
    def wins(channels: int) -> bool:
        rows = 10**9 // channels  # so many that neither weights nor a launch count
        sizes = {"linear_gelu": (4 * channels, channels), "gelu_gradient": (4 * channels, channels),
                 "product_add": (channels, 4 * channels), "weight_gradient": (3 * channels, channels)}[kernel]
        return one_pass_wins(kernel, rows, *sizes, BF16, 90)

    assert wins(round(0.9 * breakeven)) and not wins(round(1.1 * breakeven))
    assert wins(64), "where both wait for memory"


def test_a_launch_counts_where_there_is_little_work() -> None:
    assert one_pass_wins("product_add", 64, 2048, 8192, BF16, 90)
    assert not one_pass_wins("product_add", 2**16, 2048, 8192, BF16, 90)


def test_without_a_gpu_it_is_one_pass() -> None:
    def ways() -> Any:
        raise AssertionError("nobody is asked")

    assert way("product_add", 2**16, 2048, 8192, BF16, torch.device("cpu"), ways) == FUSED


def test_wide_tiles_fill_their_matrix() -> None:
    assert wide_tiles(512, BF16, 90) and not wide_tiles(384, BF16, 90)
    assert not wide_tiles(512, torch.float32, 90) and not wide_tiles(512, BF16, 80)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """A GPU that says how long each way takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTMIM_TUNE", raising=False)
    times: dict[Any, float] = {FUSED: 2.0, APART: 1.0}
    answers = {"is_initialized": True, "is_current_stream_capturing": False, "get_device_name": "A GPU/1",
               "get_device_capability": (9, 0)}
    for name, value in ((name, lambda *_, answer=answer: answer) for name, answer in answers.items()):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tune, "milliseconds", lambda run: times[run.__name__])
    tune.forget()
    yield times
    tune.forget()


def ask(columns: int = 2048, dtype: torch.dtype = BF16) -> str:
    def fused() -> torch.Tensor:
        return torch.full((2,), RIGHT["value"], dtype=BF16)

    def apart() -> torch.Tensor:
        if RIGHT["raises"]:
            raise RIGHT["raises"]
        return fused() * RIGHT["factor"]

    ways = {FUSED: fused, APART: apart}
    return way("product_add", 2**16, columns, 4 * columns, dtype, GPU, lambda: ways)


def test_float32_with_tf32_is_asked_for_by_itself(gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for exactness, seconds in (("ieee", 0.5), ("tf32", 5.0), ("ieee", 5.0)):
        monkeypatch.setattr(policy, "precision", lambda dtype, now=exactness: now)
        gpu |= {FUSED: seconds}
        found.append(ask(8192, torch.float32))
    assert found == [FUSED, APART, FUSED], "the third is the first's"


def test_the_faster_way_is_taken_and_kept_for_the_next_process(gpu: dict[str, float], tmp_path: Path) -> None:
    assert ask(128) == FUSED, "bandwidth-bound: the GPU need not be asked"
    assert ask() == APART
    gpu |= {FUSED: 0.5}
    assert ask() == APART and ask(1024) == FUSED
    tune.forget()
    assert ask() == APART, "from the disk"
    (file,) = tmp_path.glob("fastmim/tuned-A-GPU-1*.json")
    (key,) = (key for key in json.loads(file.read_text()) if "8192" in key)
    for torn in ("[]", "", "{", json.dumps({key: ["apart"]}), json.dumps({key: {}}), json.dumps({key: "gone"})):
        file.write_text(torn)
        tune.forget()
        assert ask() == FUSED, "measured again"


def test_nothing_is_measured_where_it_must_not(gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch,
                                               tmp_path: Path) -> None:
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert ask() == FUSED
        m.setenv("FASTMIM_TUNE", "0")
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert ask() == FUSED

    def full(run: Any) -> float:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as m:
        m.setattr(tune, "milliseconds", full)
        assert ask() == FUSED
    assert not list(tmp_path.rglob("*.json")) and ask() == FUSED, "the steps of a run have the same bits"
    tune.forget()
    assert ask() == APART, "another process asks again"


@pytest.mark.parametrize("broken", [float("inf"), float("nan"), RuntimeError("out of resource: shared memory")])
def test_what_holds_for_a_moment_is_not_kept_for_others(broken: Any, gpu: dict[str, float], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that a loss scale has let overflow agree with nothing; a way that does not run is none."""
    with monkeypatch.context() as m:
        m.setitem(RIGHT, "raises" if isinstance(broken, Exception) else "value", broken)
        assert ask() == FUSED
    assert not list(tmp_path.rglob("*.json")) and ask() == FUSED, "the steps of a run have the same bits"
    tune.forget()
    assert ask() == APART, "another process asks again"


def test_the_way_that_all_must_agree_with_has_to_run(gpu: dict[str, float]) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        way("product_add", 2**16, 2048, 8192, BF16, GPU, lambda: {FUSED: broken, APART: lambda: torch.ones(1)})


def test_a_fast_way_that_is_wrong_does_not_win(gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    for factor, taken in ((1.01, APART), (1.2, FUSED), (float("nan"), FUSED)):
        monkeypatch.setitem(RIGHT, "factor", factor)
        assert ask(2048 + 256 * round(factor * 100) if factor == factor else 8192) == taken


def test_a_cache_that_cannot_be_written_is_no_error(gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch,
                                                    tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ask() == APART




def test_the_roofs_are_those_of_the_planner() -> None:
    from fastmim.plan.hardware import GPUS
    for sm, name in ((80, "a100-80g"), (90, "h100-80g"), (100, "b200-180g")):
        gpu, roofs = GPUS[name], roofs_of(sm)
        assert (roofs.bandwidth, roofs.low, roofs.full) == (gpu.bandwidth, gpu.flops, gpu.fp32)
