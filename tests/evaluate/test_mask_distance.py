"""AvgDist against SciPy's exact distance transform and by hand; the report and picture of ``fastmim masks``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt

from fastmim import cli
from fastmim.evaluate.mask_distance import (
    average_distance,
    distance_band,
    distance_table,
    hidden_pixels,
    squared_distances,
    table_units,
)
from fastmim.objectives.unit_masks import UnitMasks

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model: {name: vit, img_size: [48, 64], patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2, in_chans: 1}
objective: {unit: 8, mask: block, mask_ratio: 0.4}
"""


@pytest.mark.parametrize("shape, share", [
    ((3, 17, 23), 0.5), ((2, 31, 5), 0.97), ((2, 40, 60), 0.995), ((1, 1, 9), 0.5), ((4, 9, 1), 0.6),
])  # fmt: skip
def test_distances_are_scipys(shape, share):
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    hidden[:, -1, 0] = False
    for one, found in zip(hidden.numpy(), squared_distances(hidden).numpy(), strict=True):
        np.testing.assert_array_equal(found, np.rint(distance_transform_edt(one) ** 2))


@pytest.mark.parametrize("kind, unit, ratio", [("random", 8, 0.6), ("block", 4, 0.8), ("square", 8, 0.25)])
def test_avgdist_is_the_mean_over_hidden_pixels(kind, unit, ratio):
    hidden = UnitMasks(48, 1, kind=kind, mask_ratio=ratio, unit=unit)(torch.arange(5))
    distances = [distance_transform_edt(one.numpy())[one.numpy()] for one in hidden]
    assert average_distance(hidden) == pytest.approx(np.concatenate(distances).mean())


def test_one_square_by_hand():
    """3 × 3 in the middle: eight pixels at distance 1, the middle at 2; with a mask that hides nothing beside it."""
    hidden = torch.zeros(2, 7, 7, dtype=torch.bool)
    hidden[0, 2:5, 2:5] = True
    assert average_distance(hidden) == pytest.approx((8 + 2) / 9)


def test_images_without_a_visible_or_a_hidden_pixel_are_refused():
    hidden = torch.ones(2, 3, 3, dtype=torch.bool)
    hidden[0, 0, 0] = False
    with pytest.raises(ValueError, match="every pixel"):
        average_distance(hidden)
    with pytest.raises(ValueError, match="no pixel"):
        average_distance(~torch.ones(1, 3, 3, dtype=torch.bool))


def test_cells_are_cut_by_the_image():
    hidden = hidden_pixels(torch.tensor([[[1, 0], [0, 1]]]), (5, 6), 4)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[:4, :4] = expected[4:, 4:] = True
    assert torch.equal(hidden[0], expected)


def test_the_table_is_of_masks_that_exist():
    table = distance_table((48, 64), table_units((48, 64), own=24), count=4)
    units = {unit for unit, _ in table}
    assert units == {2, 4, 8, 16, 24}  # 3 of 16 px in 48, and one's own
    assert (24, 0.8) in table and (24, 0.9) not in table  # ceil(0.9 · 6) hides all
    masks = UnitMasks((48, 64), 8, kind="random", mask_ratio=0.7, unit=16)
    again = average_distance(masks(torch.arange(4)).repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert table[16, 0.7] == pytest.approx(again)
    for ratio in (0.3, 0.6):  # larger units and ratios hide further
        values = [table[unit, ratio] for unit in (2, 4, 8, 16)]
        assert values == sorted(values) and all(table[unit, ratio] < table[unit, 0.8] for unit in (2, 4, 8))
    assert set(distance_table((192, 192), [32], "square", 4)) == {(32, 4 / 36), (32, 9 / 36), (32, 16 / 36)}


def test_the_band_is_the_papers_and_smaller_images_have_a_smaller_one():
    assert distance_band((192, 256)) == distance_band((224, 224)) == (10.0, 20.0)
    assert distance_band((48, 96)) == (2.5, 5.0)


def report(capsys, *argv):
    status = cli.main(["masks", *map(str, argv)])
    return status, *capsys.readouterr()


@pytest.fixture()
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_the_command_prints_what_the_masks_hide_and_draws_them(config, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for shade in (0, 255):
        Image.fromarray(np.full((48, 64), shade, np.uint8)).save(folder / f"{shade}.png")
    picture = tmp_path / "new" / "masks.png"
    status, out, err = report(capsys, config, f"data.path={folder}", "--out", picture, "--samples", 3)
    assert status == 0, err
    masks = UnitMasks((48, 64), 8, kind="block", mask_ratio=0.4, unit=8)
    hidden = hidden_pixels(masks(torch.arange(64)), (48, 64), 8)
    assert "simmim, block masks of units of 8 px in images of 48 × 64 px" in out
    assert "hidden    41.7 % of the pixels: 20 of 48 units" in out
    assert f"AvgDist   {average_distance(hidden):.1f} px, above the band of SimMIM's good runs: smaller units" in out
    assert "here 2.5 to 5.0 px in proportion, a guess" in out and f"{picture}: 3 masks over 2 images" in out
    image = np.asarray(Image.open(picture).convert("RGB"))
    assert (image == 0).all(-1).any() and (abs(image - 127.5) < 1).all(
        -1
    ).sum() > 1000  # a black image under grey units


def test_only_simmim_is_advised_by_its_band(tmp_path, capsys):
    config = tmp_path / "mae.yaml"
    config.write_text(TINY.replace("{unit: 8, mask: block, mask_ratio: 0.4}", "{name: mae, mask_ratio: 0.95}"))
    status, out, err = report(capsys, config, "model.abs_pos_embed=sincos")
    assert status == 0, err
    assert "above the band of SimMIM's good runs, which says little of another objective" in out
    assert "would be nearer" not in out


def test_a_square_has_a_column_for_each_edge(config, capsys):
    status, out, _ = report(capsys, config, "objective.mask=square", "objective.mask_ratio=0.19")
    lines = out.splitlines()
    assert status == 0 and "9 of 48 units" in out
    assert ["unit", "2", "×", "2", "3", "×", "3", "4", "×", "4"] in [line.split() for line in lines]
    row = next(line for line in lines if line.startswith("   8 "))
    assert "(0.083)" in row and "(0.188)" in row and "(0.333)" in row


@pytest.mark.parametrize("words, said", [
    (["objective.mask=square"], "objective.mask_ratio=0.4: mask=square hides no such share of 6 × 8 units"),
    (["data.path=/no/such/folder", "--out", "x.png"], "data.path=/no/such/folder: no such folder"),
])  # fmt: skip
def test_mistakes_are_one_line(words, said, config, capsys):
    status, out, err = report(capsys, config, *words)
    assert status == 2 and out == "" and said in err and err.count("\n") == 1, err


def test_an_objective_that_hides_nothing_says_so(capsys):
    status, out, err = report(capsys, ROOT / "configs/dino/vit_small.yaml")
    assert (status, out) == (2, "") and err.startswith("fastmim: error: objective: DINO hides nothing in epoch 0; ")
