"""The planner's peak against torch's own MemTracker on a small SwinV2-G: extra norms, window 12, every policy kind."""

from __future__ import annotations

import csv
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import check_plan  # noqa: E402

SMALL: dict[str, Any] = dict(
    name="swinv2_giant", embed_dim=64, depths=(1, 1, 3, 1), num_heads=(2, 4, 8, 16), extra_norm_period=2,
    drop_path_rate=0.1,
)  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "full"])
def test_peak_of_a_training_step(policy: str) -> None:
    cfg = check_plan.config(SMALL, policy, batch=32)
    assert check_plan.planned_peak(cfg) == pytest.approx(check_plan.tracked_peak(cfg), rel=0.10)


def test_the_committed_figures() -> None:
    """SwinV2-G at batch 64 with full recomputation was confirmed within 10 %, and fits 80 GB."""
    with (check_plan.command.RESULTS / "check_plan.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    giant = [r for r in rows if (r["model"], r["recompute"], r["batch"]) == ("swinv2_giant", "full", "64")]
    assert giant and all(abs(float(row["planned_over_tracked"]) - 1) < check_plan.TOLERANCE for row in rows)
    assert max(float(giant[0]["planned_gb"]), float(giant[0]["tracked_gb"])) < 80
