"""The harness itself, on made-up clocks and made-up losses: what it reports, and what it refuses to report."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_compare, bench_memory, bench_pretrain, bench_profile, harness, measure, providers
from benchmarks.providers import Case
from benchmarks.rows import faster

TINY = (("img_size", 64), ("embed_dim", 8), ("depths", (1, 1, 1, 1)), ("num_heads", (1, 2, 4, 8)), ("window_size", 2))


class FakeClock:
    """Time passes only where a step says that it works; each unit of work takes what ``speed`` gives."""

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.time, self.calls, self.speed = 0.0, 0, speed

    def work(self, units: float) -> None:
        self.time += units * self.speed(self.calls)
        self.calls += 1

    def mark(self) -> float:
        return self.time

    def wait(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class FakeStep:
    """Forward, backward and update of 1, 2 and 1 units of work, times ``cost``."""

    def __init__(self, cost: float, clock: FakeClock) -> None:
        self.cost, self.clock = cost, clock

    def __call__(self) -> measure.Phases:
        return measure.run_step(self, torch.empty(0), torch.empty(0), self.clock)[0]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        self.clock.work(self.cost)
        return torch.tensor(1.0)

    def backward(self, loss: Tensor) -> None:
        self.clock.work(2 * self.cost)

    def update(self) -> None:
        self.clock.work(self.cost)


def compare(speed: Callable[[int], float], costs: dict[str, float], rounds: int = 9) -> dict[str, dict[str, Any]]:
    clock = FakeClock(speed)
    phases = measure.interleave({name: FakeStep(cost, clock) for name, cost in costs.items()}, rounds)
    first = next(iter(costs))
    return {n: measure.speed_columns(p, 4, phases[first]) | {"provider": n, "baseline": first, "note": ""}
            for n, p in phases.items()}  # fmt: skip


def test_a_provider_made_twice_as_slow_is_reported_as_that() -> None:
    jitter = itertools.cycle((1.0, 1.07, 0.95, 1.1, 0.98, 1.02, 0.9))
    rows = compare(lambda call: next(jitter), {"fastmim": 1.0, "slow": 2.0})
    median, low, high = faster(rows["slow"])
    assert low <= 2.0 <= high and low < median < high
    assert low > 1.8 and high < 2.2


def test_an_exact_clock_gives_exact_numbers() -> None:
    rows = compare(lambda call: 0.5, {"fastmim": 1.0, "slow": 2.0})
    assert (rows["slow"]["ratio"], rows["slow"]["ratio_p20"], rows["slow"]["ratio_p80"]) == ("0.500",) * 3
    assert rows["slow"]["seconds"] == "4.0000" and rows["slow"]["images_per_sec"] == "1.000"
    assert [rows["slow"][f"{p}_s"] for p in ("forward", "backward", "optimizer")] == ["1.0000", "2.0000", "1.0000"]


def test_a_drift_of_the_machine_meets_all_providers_alike() -> None:
    """The machine becomes ten times slower while it is measured: equal providers stay equal."""
    rows = compare(lambda call: 1 + 9 * call / 120, {"fastmim": 1.0, "same": 1.0}, rounds=20)
    _, low, high = faster(rows["same"])
    assert low <= 1.0 <= high


def test_wrong_losses_are_refused() -> None:
    losses = {
        "judge": (0.9, 0.8),
        "same": (0.90001, 0.8001),
        "wrong": (0.91, 0.8),
        "no update": (0.9, 0.9),
        "nan": (float("nan"), 0.8),
    }
    found = measure.refusals(losses, "judge", measure.TOLERANCE["fp32"])
    assert set(found) == {"wrong", "no update", "nan"}
    assert "first loss 0.910000" in found["wrong"] and "after two updates" in found["no update"]


class OffByOnePercent(nn.Module):
    """A provider whose loss is nearly right."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"loss": 1.01 * self.module(images, mask)["loss"]}


def arguments(*names: str, baseline: str = "fastmim") -> argparse.Namespace:
    return argparse.Namespace(
        providers=list(names), reference=None, baseline=baseline, rounds=1, warm_up=0, threads=None, clock="wall"
    )


def test_no_ratio_where_losses_disagree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = providers.foreign_module

    def wrong(name: str, *rest: Any) -> nn.Module:
        return OffByOnePercent(plain("timm", *rest)) if name == "lightly" else plain(name, *rest)

    monkeypatch.setattr(providers, "foreign_module", wrong)
    case = Case("swin_base", "fp32", 2, overrides=TINY)
    rows, refused = bench_compare.measure_case(case, arguments("fastmim", "timm", "lightly"), apart=False)
    assert [row["provider"] for row in rows] == ["fastmim", "timm"] and refused == 1
    assert "REFUSED lightly" in capsys.readouterr().err


def test_nothing_is_reported_where_the_baseline_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Case.build
    monkeypatch.setattr(
        Case, "build", lambda self, **kw: OffByOnePercent(plain(self, **kw)) if kw else plain(self, **kw)
    )
    monkeypatch.setattr(OffByOnePercent, "load_state_dict", lambda self, state: self.module.load_state_dict(state))
    case = Case("swin_base", "fp32", 2, overrides=TINY)
    rows, refused = bench_compare.measure_case(case, arguments("fastmim", "timm"), apart=False)
    assert rows == [] and refused == 1


def test_energy_is_that_of_a_stretch_of_steps() -> None:
    state = {"time": 0.0, "joules": 100.0}

    def run() -> None:
        state["time"] += 0.3
        state["joules"] += 12.0

    found = measure.joules_per_image(run, 4, lambda: state["joules"], least=2.0, now=lambda: state["time"])
    assert found == pytest.approx(3.0) and state["time"] == pytest.approx(2.1)


def test_share_of_a_peak_needs_a_known_device() -> None:
    assert measure.mfu(100.0, 3000.0, "NVIDIA A100-SXM4-80GB") == pytest.approx(300e12 / 312e12)
    assert measure.mfu(100.0, 3000.0, "NVIDIA H100 80GB HBM3") == pytest.approx(300e12 / 989e12)
    assert measure.mfu(100.0, 3000.0, "NVIDIA A10") is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_the_peak_is_that_since_the_reset() -> None:
    size = 200 * 2**20
    held = torch.ones(size, dtype=torch.uint8)
    del held
    measure.return_freed_memory()
    measure.reset_peak_memory("cpu")
    before = measure.resident("VmHWM")
    held = torch.ones(size // 2, dtype=torch.uint8)
    after = measure.resident("VmHWM")
    assert held.sum() == size // 2
    assert 0.9 * size / 2 < after - before < 0.9 * size


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    case = Case("swin_base", "fp32", 2, overrides=TINY)
    args = argparse.Namespace(reference=None, threads=1)
    assert "--reference DIR" in bench_memory.measure_apart("microsoft-swin", case, args)
    answer = bench_memory.measure_apart("timm", case, args)
    assert not isinstance(answer, str)
    found, losses = answer
    assert found["memory_kind"] == "resident" and float(found["loss"]) == pytest.approx(losses[0], abs=1e-6)
    assert float(found["peak_memory_gib"]) >= float(found["start_memory_gib"]) > 0.05
    assert float(found["saved_mb_per_image"]) > 0 and float(found["loss"]) > 0


def test_memory_of_a_provider_with_another_loss_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"fastmim": (1.0, 0.9), "fastmim-torch": (1.0, 0.5), "timm": (1.0, 0.9)}
    monkeypatch.setattr(bench_memory, "measure_apart", lambda name, *_: ({"peak_memory_gib": "1"}, losses[name]))
    args = argparse.Namespace(reference=None, threads=1, providers=list(losses))
    rows, refused = bench_memory.measure_case(Case("swin_base", "fp32", 2, overrides=TINY), args)
    assert [row["provider"] for row in rows] == ["fastmim", "timm"] and refused == 1


def test_csv_rows_keep_one_schema(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("benchmark,provider,ratio\nstep,ours,1.5\n", encoding="utf-8")
    harness.append_rows(path, [{"benchmark": "memory", "provider": "timm", "peak_memory_gib": "2.0"}])
    rows = harness.read_rows(path)
    assert [tuple(row) for row in rows] == [harness.COLUMNS] * 2
    assert rows[0]["ratio"] == "1.5" and rows[0]["peak_memory_gib"] == "" and rows[1]["peak_memory_gib"] == "2.0"
    with pytest.raises(ValueError, match="speed"):
        harness.append_rows(path, [{"speed": 1}])


def test_whole_runs_are_compared_interval_by_interval() -> None:
    def run(seconds: list[float]) -> dict[str, Any]:
        rows = [{"seconds": s, "data": s / 10, "loss": 0.5} for s in seconds]
        return {"rows": rows, "wall": 5 * sum(seconds), "peak_memory_gib": "2.0", "memory_kind": "resident"}

    # The first intervals are warm-up.
    ours, theirs = [run([9, 9, 1.0, 1.2, 1.1])], [run([1, 1, 2.0, 2.4, 2.2])]
    found = bench_pretrain.columns(theirs, ours, batch=4)
    assert (found["ratio"], found["seconds"], found["images_per_sec"]) == ("0.500", "2.2000", "1.818")
    assert found["data_s"] == "0.2200" and found["wall_s"] == "43.0"


def test_time_is_told_apart_by_kind_of_op() -> None:
    events = [("aten::mm", 1.0), ("aten::addmm", 2.0), ("mkldnn::_linear_pointwise", 0.5), ("aten::mul_", 0.25),
              ("fastmim::window_attention_backward", 0.5), ("aten::_softmax", 0.25), ("aten::_fused_adamw_", 1.0),
              ("aten::copy_", 0.1), ("aten::avg_pool2d", 0.2), ("aten::native_layer_norm", 0.3), ("made up", 0.05),
              ("aten::mkldnn_convolution", 0.5)]  # fmt: skip
    assert bench_profile.by_kind(events) == pytest.approx({
        "matrix products": 4.0, "optimiser": 1.0, "attention": 0.75, "norms": 0.3, "elementwise, sums": 0.25,
        "target": 0.2, "copies": 0.1, "everything else": 0.05,
    })  # fmt: skip


def test_photographs(tmp_path: Path) -> None:
    from PIL import Image

    folder = bench_pretrain.photographs(tmp_path, 4)
    files = sorted((folder / "images").glob("*.jpg"))
    assert len(files) == 4
    assert {Image.open(file).size for file in files} == {(500, 375)}
    assert len({file.read_bytes() for file in files}) == 4
