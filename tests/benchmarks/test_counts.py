"""A real model made fake counts what the same model counts that never was real."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("triton")

from benchmarks import bench_counts, harness, step_count  # noqa: E402
from benchmarks.providers import Case  # noqa: E402

TINY = dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8))


@pytest.mark.parametrize("name", ["swin_base", "swinv2_base"])
def test_a_foreign_module_is_counted_as_the_baseline(name: str) -> None:
    build = bench_counts.builder("timm", Case(name, overrides=tuple(TINY.items())), None)
    found, expected = (step_count.count_step(b, batch=4) for b in (build, step_count.baseline(name, **TINY)))
    assert found.counter.totals() == expected.counter.totals()
    assert found.saved.bytes == expected.saved.bytes


def test_rows_of_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(reference=None, providers=["fastmim", "timm", "microsoft-swin"])
    rows = bench_counts.measure_case(Case("swin_base", "bf16", 2, overrides=tuple(TINY.items())), args)
    assert [row["provider"] for row in rows] == ["fastmim", "timm"] and "--reference" in capsys.readouterr().err
    assert rows[0]["launches"] < rows[1]["launches"] and {*rows[0]} <= {*harness.COLUMNS}


def test_plain_flops_are_those_of_the_matrix_products() -> None:
    depth, dim, patches, heads = 2, 32, 16, 2
    case = Case("vit_base", overrides=(("img_size", 64), ("embed_dim", dim), ("depth", depth), ("num_heads", heads)))
    tokens = patches + 1
    block = 2 * tokens * dim * (3 * dim + dim + 2 * 4 * dim) + 2 * 2 * tokens * tokens * dim
    head = 2 * patches * dim * 16 * 16 * 3
    embed = 2 * patches * 16 * 16 * 3 * dim
    # Backward is twice forward, but images need no gradient.
    assert bench_counts.model_gflop(case) * 1e9 == pytest.approx(3 * (depth * block + head) + 2 * embed, rel=1e-6)
