"""Rivals compute what our op computes before they are timed, and what they lack is said."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

import fastmim_kernels as fk
from benchmarks import bench_kernels, bench_rivals, kernel_works, rivals
from benchmarks.kernel_works import WORKS

TINY = dict(name="swinv2", embed_dim=16, num_heads=(2,), window_size=6, depths=(2,))
SIZES = {"swinv2_base": TINY, "swin_base": TINY | {"name": "swin", "window_size": 4}}
CPU = torch.device("cpu")
# A clone in shape: the signature and the dtypes that the published function asserts, by the formula of the paper.
FAKE = """
import torch
import torch.nn.functional as F

def flash_win_attn_v2_func(q, k, v, logit_scale=None, bias=None, mask=None):
    heads, tokens = q.shape[1], q.shape[2]
    assert logit_scale.shape == (heads, 1, 1) and logit_scale.dtype == bias.dtype == q.dtype
    assert bias.shape == (heads, tokens, tokens)
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = logits * torch.clamp(logit_scale, max=4.605170185988092).exp() + bias
    if mask is not None:
        assert mask.dtype == q.dtype and mask.shape[1:] == (tokens, tokens)
        logits = logits + mask.repeat(len(q) // len(mask), 1, 1)[:, None]
    return {scale} * logits.softmax(-1) @ v
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rivals, "SIZES", SIZES)
    monkeypatch.setattr(kernel_works, "GRID", 12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, rivals.PACKAGE, raising=False)
    (tmp_path / rivals.PACKAGE).mkdir()
    (tmp_path / rivals.PACKAGE / "__init__.py").write_text(FAKE.format(scale=1))
    yield tmp_path
    sys.modules.pop(rivals.PACKAGE, None)


def run(folder: Path, *options: str) -> tuple[int, list[dict[str, str]]]:
    out = folder / "rivals.csv"
    status = bench_rivals.main([*options, "--rounds", "1", "--batch", "2", "--out", str(out)])
    with out.open(newline="") as file:
        return status, list(csv.DictReader(file))


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", ["sdpa", "flex", rivals.CLONE])
def test_a_rival_computes_what_ours_does(name: str, size: str, clone: Path) -> None:
    """Output and every gradient that it has, in float64, with a shift whose seams matter."""
    cosine = SIZES[size]["name"] == "swinv2"
    if name == rivals.CLONE and not cosine:
        with pytest.raises(rivals.Absent, match="no scaled dot product"):
            rivals.find(name, clone, CPU, cosine=cosine)
        return
    rival = rivals.find(name, clone, CPU, cosine=cosine)
    work = rival.work(WORKS["window_attention"](SIZES[size], 2, 4))
    double = {k: torch.float64 for k, v in work.arguments.items() if isinstance(v, torch.Tensor)}
    functions = (bench_kernels.provider("window_attention", "reference"), rival.attention)
    ours, theirs = (bench_kernels.results(function, work, double, CPU) for function in functions)
    assert len(ours) == 1 + len(work.grads) == (1 if name == "flex" else 3 + cosine)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-9, atol=1e-12)


def test_natten_is_called_without_bias_and_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the published signature, whose stride of a whole window makes windows of neighbourhoods."""

    def na2d(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel_size: tuple[int, int], stride: tuple[int, int],
             scale: float) -> torch.Tensor:  # fmt: skip
        assert kernel_size == stride and scale == 1.0
        b, h, w, heads, d = q.shape
        q, k, v = (fk.reference.partition(x.flatten(3), kernel_size).unflatten(-1, (heads, d)).transpose(1, 2)
                   for x in (q, k, v))  # fmt: skip
        out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return fk.reference.unpartition(out.transpose(1, 2).flatten(2), kernel_size, h, w).unflatten(-1, (heads, d))

    module = type("natten", (), {"na2d": staticmethod(na2d)})
    monkeypatch.setitem(sys.modules, "natten", module)
    rival = rivals.find("natten", None, CPU, cosine=True)
    apart, limit = bench_rivals.difference(rival, WORKS["window_attention"](TINY, 2, 4), "torch", torch.float32, CPU)
    assert apart <= limit < 1e-4 and rival.work(WORKS["window_attention"](TINY, 2, 4)).grads == ("qkv", "logit_scale")
    assert "no position bias" in rival.lacks


def test_rows(tmp_path: Path, clone: Path, capsys: pytest.CaptureFixture) -> None:
    status, rows = run(tmp_path, "--reference", str(clone), "--rivals", rivals.CLONE, "sdpa", "flex")
    assert status == 0 and rivals.CLAIM in capsys.readouterr().out
    timed = {(row["case"], row["provider"]): row for row in rows}
    assert len(timed) == len(rows) == 2 * (2 + 2 * 2 + 2 * 1)  # Flex has no backward pass here
    for (case, name), row in timed.items():
        ours = float(timed[case, "torch"]["seconds"])
        assert float(row["ratio"]) == pytest.approx(ours / float(row["seconds"]), rel=1e-2, abs=1e-3)
        assert row["peak_memory_gib"] == "", "a CPU's allocator says nothing of memory"
        assert (name == "torch") == (row["note"] == "")
    note = timed[f"window_attention backward swinv2_base, beside {rivals.CLONE}", rivals.CLONE]["note"]
    assert rivals.CLAIM in note and "windows are cut" in note and "atomics" in note


def test_a_rival_that_differs_is_not_timed(tmp_path: Path, clone: Path) -> None:
    (clone / rivals.PACKAGE / "__init__.py").write_text(FAKE.format(scale=1.001))
    status, rows = run(tmp_path, "--reference", str(clone), "--rivals", rivals.CLONE, "--sizes", "swinv2_base")
    assert status == 1 and len(rows) == 1 and not rows[0]["seconds"]
    assert rows[0]["note"].startswith("NOT TIMED: 1.00e-03 from ours")


def test_a_rival_that_raises_does_not_hide_the_next(tmp_path: Path, clone: Path) -> None:
    """As a kernel does that does not compile, or that its memory does not suffice for."""
    (clone / rivals.PACKAGE / "__init__.py").write_text(
        "def flash_win_attn_v2_func(*args):\n    raise RuntimeError('PTX was\\ncompiled')")
    status, rows = run(tmp_path, "--reference", str(clone), "--rivals", rivals.CLONE, "sdpa", "--sizes", "swinv2_base")
    assert status == 1 and [(row["provider"], bool(row["seconds"])) for row in rows] == [
        (rivals.CLONE, False), *[("torch", True), ("sdpa", True)] * 2]
    assert rows[0]["note"] == "NOT TIMED: RuntimeError: PTX was compiled"


def test_what_is_absent_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--rivals", rivals.CLONE, "--sizes", "swinv2_base", "--out", str(tmp_path / "rivals.csv")]
    assert bench_rivals.main(options) == 0 and not (tmp_path / "rivals.csv").exists()
    said = "give a clone of github.com/emiledgl/flash-window-attention-v2 with --reference DIR"
    assert said in capsys.readouterr().out


def test_a_clone_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--reference /nowhere has no flash_win_attn_v2; give the folder of a clone"):
        bench_rivals.main(["--rivals", rivals.CLONE, "--reference", "/nowhere", "--out", str(tmp_path / "rivals.csv")])
