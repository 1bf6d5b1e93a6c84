"""``fastmim reconstruct``: what a checkpoint's objective predicts of chosen images under chosen masks."""

from __future__ import annotations

import argparse
from typing import Any

from fastmim.wording import plural

from .console import shown_on_a_terminal, write


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``reconstruct`` to the command line."""
    command = commands.add_parser("reconstruct", parents=[common], help="what a checkpoint predicts of your images")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or a step-… folder")
    command.add_argument("given", metavar="IMAGES", nargs="+", help="image files, or folders or shards of them")
    command.add_argument("--out", metavar="FILE", default="reconstruction.png", help="the picture, a row an image and "
                         "seed (default reconstruction.png)")
    command.add_argument("--mask", metavar="KIND", default="random", help="random: as in training (default); square: "
                         "in the centre; or a picture, painted white where images are to be hidden")
    command.add_argument("--ratio", type=float, metavar="R", help="area of the square (default 0.25)")
    command.add_argument("--unit", type=int, metavar="PX", help="edge of the cells that a square or a painted mask is "
                         "made of, whole patches (default: a token of the encoder)")
    command.add_argument("--seed", type=int, nargs="+", metavar="S", help="of random masks; several give an image "
                         "several rows (default 0)")
    command.add_argument("--bands", type=int, nargs="+", metavar="N", help="channels to draw, one as grey or three as "
                         "colours, from 1 on (default: the first three)")
    command.add_argument("--most", type=int, default=8, metavar="N", help="images, evenly spread (default 8; 0: all)")
    command.add_argument("--composites", metavar="DIR", help="also write each completed image, named as its file")
    command.set_defaults(command=reconstruct)


def reconstruct(options: argparse.Namespace) -> int:
    """Draw the picture, and say what it shows."""
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.engine.predict import Wanted, predict_images

    bands, seeds = (None if given is None else tuple(given) for given in (options.bands, options.seed))
    wanted = Wanted(mask=options.mask, ratio=options.ratio, unit=options.unit, seeds=seeds, bands=bands)
    drawn = predict_images(
        options.checkpoint, options.given, wanted, out=options.out, most=options.most, composites=options.composites
    )
    lines = [f"{path}: left out: {reason}" for path, reason in sorted(drawn.bad_files.items())]
    lines.append(f"{options.out}: {plural(drawn.images, 'image')}, {' | '.join(drawn.headings)}")
    if options.composites:
        lines.append(f"{options.composites}: {plural(drawn.composites, 'image')}")
    write("\n".join(lines) + "\n")
    return 0
