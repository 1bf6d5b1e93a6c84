"""bench_kernels: a wrong provider is not timed, the closed forms are filled in, the picture shows the CSV."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bars, bench_kernels, kernel_works

TINY = dict(name="swinv2", embed_dim=16, num_heads=(2,), window_size=6, depths=(2,))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "SIZES", {"tiny": TINY, "swin_tiny": TINY})
    monkeypatch.setattr(kernel_works, "GRID", 12)
    monkeypatch.setattr(bench_kernels, "COPY_BYTES", 2**23)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *ops: str) -> tuple[int, list[dict[str, str]]]:
    out = tmp_path / "kernels.csv"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--sizes", "swin_tiny", "--ops", *ops, "--providers", "torch",
                                      "reference", "--batch", "1", "--rounds", "1", "--out", str(out)])
    status = bench_kernels.main()
    with out.open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_rows_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ops = [op for op in bench_kernels.WORKS if op not in ("linear_masked_l1", "local_norm_target")]
    status, rows = run(monkeypatch, tmp_path, *ops)
    assert status == 0 and len(rows) == (2 * len(ops) - ("distillation" in ops)) * 2  # whose gradient is made at once
    for row in rows:
        assert float(row["seconds"]) > 0 and float(row["ratio"]) > 0
        assert float(row["mb_per_image"]) > 0 and float(row["roofline_share"]) > 0
        assert re.match(r"[\d.e-]+ GB/s, a copy [\d.]+; error [\d.e+-]+ <= ", row["note"])
    compared = [float(row["ratio"]) for row in rows if row["provider"] == "torch"]
    widths = re.findall(r'class="part[^"]*" style="left:0.00%;width:([\d.]+)%', bars.speedups(rows))
    drawn = [float(width) for width in widths]
    most = min(max(compared), bars.CUT)
    assert drawn == pytest.approx([100 * min(ratio, most) / most for ratio in compared], abs=0.01)


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = bench_kernels.provider
    monkeypatch.setattr(bench_kernels, "provider", lambda op, name: original(op, name) if name == "reference" else
                        lambda **kwargs: original(op, name)(**kwargs) * 1.1)
    status, rows = run(monkeypatch, tmp_path, "patch_merge")
    wrong = [row for row in rows if row["provider"] == "torch"]
    assert status == 1 and len(wrong) == 1 and not wrong[0]["seconds"] and not wrong[0]["ratio"]
    assert wrong[0]["note"].startswith("NOT TIMED: error")
    assert [row["case"] for row in rows if row["provider"] == "reference"] == [
        "patch_merge forward swin_tiny", "patch_merge backward swin_tiny"]


def test_an_op_that_makes_its_gradients_in_forward_is_timed_as_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                                                      ) -> None:
    status, rows = run(monkeypatch, tmp_path, "linear_masked_l1")
    assert status == 0 and [row["case"] for row in rows] == ["linear_masked_l1 step swin_tiny"] * 2
    assert all(float(row["roofline_share"]) > 0 for row in rows)
