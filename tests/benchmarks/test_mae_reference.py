"""The comparison with MAE's reference measures nothing where the losses differ, and takes turns where they agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from benchmarks import mae_reference as bench  # noqa: E402
from benchmarks.train_step import Provider  # noqa: E402


class Other(nn.Module):
    def __init__(self, source: nn.Module, factor: float) -> None:
        super().__init__()
        self.source, self.factor = source, factor

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.factor * self.source(images, mask)["loss"]}


def test_another_loss_ends_the_comparison() -> None:
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    source = bench.ours(bench.encoder_of("vit_base", **sizes), (16, 1, 2))
    inputs = torch.randn(2, 3, 32, 32), source.random_mask(torch.arange(2))
    assert bench.check_losses(source, Other(source, 1 + 1e-6), "fp32", inputs) < 1e-5
    with pytest.raises(ValueError, match="fp32: our loss is .* nothing was measured"):
        bench.check_losses(source, Other(source, 1 + 1e-4), "fp32", inputs)


def test_steps_take_turns_to_begin() -> None:
    calls: list[str] = []

    def step(name: str) -> Provider:
        return Provider(name, nn.Identity(), lambda *_: torch.zeros(()), lambda _: calls.append(name), lambda: None)

    rows = bench.paired_seconds([step("a"), step("b")], (torch.zeros(1), torch.zeros(1)), 2)
    assert "".join(calls) == "abbaab" and len(rows) == 2 and all(len(row) == 2 for row in rows)


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--reference", str(tmp_path)])
    assert ended.value.code == 2 and "no models_mae.py in it" in capsys.readouterr().err
