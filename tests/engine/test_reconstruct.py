"""``fastmim reconstruct``: the picture hides what was chosen, completes it, and leaves the rest of an image alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from fastmim import train
from fastmim.cli import main
from fastmim.engine.checkpoint import convert
from fastmim.engine.saved import load_objective
from fastmim.evaluate.given_mask import painted_cells, square_cells

CELL, GAP, HEADING = 192, 4, 24


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures):
    from fastmim.config import load_config

    out = tmp_path_factory.mktemp("run")
    words = ["model.name=swinv2", "model.img_size=32", "model.patch_size=4", "model.embed_dim=8", "model.depths=[2,1]",
             "model.num_heads=[1,2]", "model.window_size=4", "objective.unit=8", f"data.path={pictures}",
             "data.num_workers=0", "train.steps=1", "train.micro_batch_size=4", "output.loggers=[]",
             "output.pictures=0", f"output.dir={out}"]  # fmt: skip
    train(load_config(None, words))
    return out


def cell(picture, row, column):
    """The array of one image of a grid, in its own pixels."""
    left, top = GAP + column * (CELL + GAP), HEADING + row * (CELL + GAP)
    return np.asarray(picture)[top : top + CELL : CELL // 32, left : left + CELL : CELL // 32]


def test_a_painted_mask_hides_what_is_white_and_the_composite_keeps_the_rest(run, pictures, tmp_path, capsys):
    painted = Image.new("RGBA", (64, 64), (255, 255, 255, 0))  # transparent: visible, whatever its colour
    ImageDraw.Draw(painted).rectangle((16, 8, 47, 23), fill=(255, 255, 255, 255))
    painted.save(tmp_path / "painted.png")
    files = [str(pictures / "03.png"), str(pictures / "07.png")]
    words = ["--mask", str(tmp_path / "painted.png"), "--unit", "4", "--out", str(tmp_path / "out.png")]
    assert main(["reconstruct", str(run), *files, *words, "--composites", str(tmp_path / "done")]) == 0
    assert "2 images, image | masked | prediction | composite" in capsys.readouterr().out
    hidden = np.zeros((32, 32), dtype=bool)
    hidden[4:12, 8:24] = True
    picture = Image.open(tmp_path / "out.png")
    for row, name in enumerate(("00000-03.png", "00001-07.png")):
        image, masked, guess, composite = (cell(picture, row, column) for column in range(4))
        np.testing.assert_array_equal(masked[~hidden], image[~hidden])
        assert (masked[hidden] == 128).all() and (guess[~hidden] == 128).all()
        np.testing.assert_array_equal(composite, np.where(hidden[..., None], guess, image))
        np.testing.assert_array_equal(composite, np.asarray(Image.open(tmp_path / "done" / name)))


def test_a_square_is_a_quarter_unless_said(run, pictures, tmp_path):
    for words, edge in (([], 16), (["--ratio", "0.5", "--unit", "4"], 24)):
        out = str(tmp_path / "out.png")
        assert main(["reconstruct", str(run), str(pictures / "03.png"), "--mask", "square", *words, "--out", out]) == 0
        hidden = (cell(Image.open(out), 0, 1) == 128).all(-1)
        assert hidden.sum() == edge * edge


def test_a_row_an_image_and_seed_with_masks_of_the_seed(run, pictures, tmp_path):
    words = ["--most", "2", "--seed", "5", "6", "--out", str(tmp_path / "out.png")]
    assert main(["reconstruct", str(run), str(pictures), *words]) == 0
    objective, _ = load_objective(run)
    picture = Image.open(tmp_path / "out.png")
    for row, (sample, seed) in enumerate(((0, 5), (1, 5), (0, 6), (1, 6))):
        mask = objective.random_mask(torch.tensor([sample]), seed=seed)[0].repeat_interleave(4, 0)
        hidden = mask.repeat_interleave(4, 1).numpy()
        np.testing.assert_array_equal((cell(picture, row, 1) == 128).all(-1), hidden)


def test_the_objective_is_that_of_the_checkpoint(run, tmp_path):
    objective, settings = load_objective(run)
    whole = load_file(convert(run, tmp_path / "whole.safetensors", whole=True))
    own = objective.state_dict()
    assert own.keys() == whole.keys() and all(torch.equal(own[name], whole[name]) for name in own)
    assert (objective.masks.unit, settings["data.interpolation"]) == (8, "bilinear")


def test_cells_are_counted_as_they_are_defined(tmp_path):
    levels = np.random.default_rng(0).integers(0, 2, (30, 20), dtype=np.uint8) * 255
    Image.fromarray(levels).save(tmp_path / "noise.png")
    shares = (levels > 127).reshape(3, 10, 4, 5).mean((1, 3))
    np.testing.assert_array_equal(painted_cells(tmp_path / "noise.png", 3, 4).numpy(), shares >= 0.5)
    square = square_cells(6, 8, 0.35)
    assert square.sum() == 16 and square[1:5, 2:6].all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mask", "square", "--ratio", "1.5"], "--ratio 1.5: must lie between 0 and 1"),
        (["--mask", "square", "--unit", "6"], "unit=6: not a multiple of patch_size 4"),
        (["--mask", "square", "--ratio", "2"], "--ratio 2: must lie between 0 and 1"),
        (["--mask", "no.png"], "--mask no.png: no such file; give random, square or a picture"),
        (["--mask", "{pictures}"], "is a folder; give random, square or a picture"),
        (["--mask", __file__], ": not a readable picture"),
        (["--mask", "{pictures}/00.png", "--unit", "4"], None),
        # What would change nothing is refused.
        (["--ratio", "2"], "--ratio 2: it is the area of a square, and --mask is random; give --mask square too, or "
                           "leave --ratio out"),
        (["--unit", "5", "--ratio", "0.1"], "--ratio 0.1: it is the area of a square"),
        (["--unit", "5"], "--unit 5: of the cells of a square or a painted mask, and --mask is random; give --mask "),
        (["--mask", "square", "--unit", "0"], "unit=0: not a multiple of patch_size 4; use 4"),
        (["--mask", "{pictures}/00.png", "--ratio", "0.5"], "00.png; give --mask square too, or leave --ratio out"),
        (["--mask", "square", "--seed", "1", "2"], "--seed 1 2: of random masks, and --mask is square; leave one of"),
        (["--most", "-1"], "--most -1: must not be negative"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(run, pictures, tmp_path, capsys, words, said):
    words = [word.format(pictures=pictures) for word in words]
    status = main(["reconstruct", str(run), str(pictures), "--out", str(tmp_path / "out.png"), *words])
    errors = capsys.readouterr().err
    assert (status == 0) if said is None else (status == 2 and said in errors and errors.count("\n") == 1)


def test_a_file_of_weights_and_an_empty_folder_are_refused(run, tmp_path, capsys):
    for checkpoint, said in ((run / "encoder.safetensors", "says nothing of heads"), (tmp_path, "no complete checkpo")):
        assert main(["reconstruct", str(checkpoint), str(run)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student"], "has one encoder, and no teacher; leave --student out"),
        (["--student", "--whole"], "--student: --whole writes teacher and student; leave one of the two out"),
        (["--average"], "has no moving average; objective.ema_decay of a fine-tuning makes one; leave --average out"),
    ],
)
def test_convert_refuses_what_a_run_has_not(run, tmp_path, capsys, words, said):
    """SimMIM has no teacher: its encoder is written without an option that would not be heard."""
    for out in ("a.safetensors", "folder", "a.onnx"):
        assert main(["convert", str(run), str(tmp_path / out), *words]) == 2
        errors = capsys.readouterr().err
        assert words[0] in errors and errors.count("\n") == 1 and not (tmp_path / out).exists()
        assert said in errors or out != "a.safetensors"
    if "--whole" not in words:
        (tmp_path / "folder").mkdir(), (tmp_path / "folder/config.json").write_text("{}")
        assert main(["convert", str(run), str(tmp_path / "folder"), *words]) == 2 and said in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["config.json"]


def test_the_log_names_the_run_and_no_file_that_was_made_for_a_moment(run, labelled, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastmim")
    assert main(["features", str(run), str(labelled), "--out", str(tmp_path / "f.safetensors")]) == 0
    assert main(["probe", str(run), str(labelled), "--protocol", "none"]) == 0
    told = [line for line in caplog.messages if "tensors loaded" in line]
    assert len(told) == 2 and all(line.startswith(f"{run}: ") for line in told)
