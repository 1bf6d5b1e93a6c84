"""``fastmim report``: the page says what the files of the runs say, holds all of it, and runs nothing of them."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from fastmim.cli import main
from fastmim.config import load_config, save_config
from fastmim.evaluate.reconstruct import write_grid
from fastmim.objectives.pictures import RECONSTRUCTION, Picture
from fastmim.objectives.unit_masks import UnitMasks
from fastmim.report.charts import CHARTS, draw
from fastmim.report.runs import read_run

HOSTILE = "<script>alert('x')</script>"


def make_run(folder, rows, *words, bad=None):
    folder.mkdir(parents=True)
    save_config(load_config(None, ["data.path=/images", *words]), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad_files.json").write_text(json.dumps(bad or {}))
    (folder / "reconstructions").mkdir()
    return folder


def row(step, **numbers):
    return {"step": step, "epoch": step / 10, "loss": 1 / step, "lr": 1e-3, "images_per_sec": 10.0 * step,
            "step_time": 0.5, "data_time": 0.1, "peak_memory_gib": 0.25, **numbers}  # fmt: skip


class Page(HTMLParser):
    """Text of the cells by row, and every address that a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    first = make_run(root / "one" / "same", [row(1), row(4, val_loss=0.5, knn_top1=61.5)], "optim.lr=0.001",
                     bad={f"/images/{HOSTILE}.png": "cut short"})  # fmt: skip
    second = make_run(root / "two" / "same", [row(2, teacher_entropy=3.0), row(6, knn_top1=70.25)], "optim.lr=0.002")
    for step in (10, 20, 30, 40, 50):
        Image.new("RGB", (1600, 40), (step, 0, 0)).save(first / "reconstructions" / f"step-{step:08d}.png")
    (second / "reconstructions" / "step-00000001.png").write_text("no picture")
    assert main(["report", str(first), str(second), "--out", str(root / "page.html")]) == 0
    return (root / "page.html").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_runs(page):
    rows = {found[0]: found[1:] for found in Page(page).rows if found}
    assert rows[""][:2] in (["one/same", "two/same"], ["one/same", "two/same", ""])
    assert rows["training loss"] == ["0.25", "0.1667"]
    assert rows["held-out loss"] == ["0.5", "–"]
    assert rows["images a second"] == ["40", "60"]  # the first row holds the start
    assert rows["time in steps"] == ["2.0 s", "3.0 s"]
    assert rows["optim.lr"] in (["0.001", "0.002"], ["0.001"], ["0.002"])
    # The headline has the figures of the table, and each run's own.
    assert "2 runs side by side. Best: k-NN at the end 70.25 (two/same), images a second 60 (two/same)." in page
    assert "teacher entropy" in page


def test_only_the_keys_that_differ_are_compared(page):
    compared = page[page.index("In which the configs differ") : page.index("<details", page.index("configs differ"))]
    assert re.findall(r'class="key">([a-z_.]+)</th>', compared) == ["optim.lr"]


def test_it_needs_nothing_beside_it_and_shows_hostile_names_as_text(page):
    parsed = Page(page)
    outside = [one for one in parsed.addresses if not one.startswith(("#", "data:image/webp;base64,"))]
    assert not outside and not parsed.tags & {"script", "iframe", "object", "link"}
    assert "&lt;script&gt;alert" in page
    assert "url(http" not in page


def test_pictures_are_the_last_and_a_few_earlier_ones_of_those_that_can_be_read(page):
    found = [Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r"base64,([^\"]+)", page)]
    assert [image.size for image in found] == [(1200, 30)] * 4
    reds = [image.convert("RGB").getpixel((5, 5))[0] for image in found]
    assert all(abs(red - step) < 6 for red, step in zip(reds, (50, 10, 20, 30), strict=True))


def test_curves_take_the_ink_of_the_page(page):
    assert page[: page.index('id="masks"')].count("<svg") == 6 and "currentColor" in page and "#010203" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_axes_of_amounts_begin_at_0_and_steps_are_whole(tmp_path):
    run = read_run(make_run(tmp_path / "run", [row(1), row(2), row(3, images_per_sec=31.0)]), "run")
    for chart in CHARTS:
        svg = draw(chart, [run])
        if chart.title in ("Images a second", "Peak memory, GiB"):
            assert re.search(r">0(\.0+)?</text>", svg), chart.title
        if chart.title == "Loss":
            assert not re.search(r">1\.5</text>", svg)


def squares(path):
    """Cells of 32 px that an SVG path of rectangles fills, as (row, column)."""
    found = set()
    for left, top, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", path):
        assert int(height) == 32
        found |= {(int(top) // 32, column // 32) for column in range(int(left), int(left) + int(width), 32)}
    return found


def test_masks_are_those_that_training_draws_in_the_epoch_of_the_last_row(tmp_path):
    words = ["model.name=vit_tiny", "model.img_size=[96, 128]", "objective.unit=32", "train.seed=3"]
    simmim = make_run(tmp_path / "simmim", [row(25)], *words)
    moco = make_run(tmp_path / "moco", [row(1)], "objective.name=moco", "model.name=vit_tiny", "model.key_bias=true",
                    "model.abs_pos_embed=sincos")  # fmt: skip
    mine = make_run(tmp_path / "mine", [row(1)])
    text = (mine / "config.yaml").read_text().replace("name: simmim", "name: nobody:Mine")
    (mine / "config.yaml").write_text(text)
    assert main(["report", str(simmim), str(moco), str(mine), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    masks = page[page.index('<h2 id="masks"') : page.index('<h2 id="settings"')]
    assert re.findall(r"<h3>(\w+)</h3>", masks) == ["simmim", "mine"], "MoCo hides nothing"
    assert "random masks of units of 32 px in images of 96 × 128 px" in masks and "8 of 12 units" in masks
    drawn = UnitMasks((96, 128), 32, kind="random", mask_ratio=0.6, unit=32)(torch.arange(8), seed=3, epoch=2)
    paths = re.findall(r'<path d="([^"]*)" fill="currentColor"', masks)
    assert [squares(path) for path in paths] == [set(map(tuple, one.nonzero().tolist())) for one in drawn]
    assert "not imported on a file&#39;s word" in masks


def test_the_columns_of_a_picture_are_named_under_it(tmp_path):
    run = make_run(tmp_path / "run", [row(1)])
    column = torch.zeros(1, 3, 8, 8)
    write_grid(Picture(RECONSTRUCTION, [column] * 4), run / "reconstructions" / "step-00000001.png")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    said = "From the left: image, masked (what the encoder sees, with hidden patches in grey), prediction (where the"
    assert f"<figcaption>{said}" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{root}/nowhere"], "no such folder"),
        (["{root}"], "no config.yaml there"),
        (["{root}/run", "{root}/run"], "given twice"),
        (["{root}/run", "--out", "page.pdf"], "must end in .html"),
        (["{root}/broken"], "not rows of numbers"),
        (["{root}/odd"], "config.yaml: not a config"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, words, said):
    make_run(tmp_path / "run", [row(1)])
    broken = make_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").write_text("[1, 2]\n[3]\n")
    (make_run(tmp_path / "odd", []) / "config.yaml").write_text("- a list")
    assert main(["report", *(word.format(root=tmp_path) for word in words)]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_files_left_out_are_counted_even_where_only_the_first_are_named(tmp_path):
    run = make_run(tmp_path / "run", [row(1)], bad={f"/images/{i:03d}.png": "cut short" for i in range(501)})
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "run: 501, of which the first\n500" in page and "/images/499.png" in page and "/images/500.png" not in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = make_run(tmp_path / "run", [])
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "0 steps" in (tmp_path / "page.html").read_text(encoding="utf-8")
