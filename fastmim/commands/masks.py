"""``fastmim masks``: draw the masks of a config, and say how far they hide."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from fastmim.wording import plural

from .configs import positive, takes_config
from .console import shown_on_a_terminal, write


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``masks`` to the command line."""
    masks = commands.add_parser(
        "masks", parents=[common], help="draw a config's masks, print AvgDist over unit and ratio"
    )
    takes_config(masks)
    masks.add_argument(
        "--out", metavar="PNG", help="draw some masks, over images of data.path if it is given, and AvgDist"
    )
    masks.add_argument("--samples", type=positive, default=8, metavar="N", help="masks to draw (default 8)")
    masks.add_argument("--epoch", type=int, default=0, metavar="E", help="whose masks (default 0)")
    masks.set_defaults(command=show_masks)


def show_masks(options: argparse.Namespace) -> int:
    """Report on the masks, and draw them."""
    with shown_on_a_terminal("loading libraries …"):
        from torch._subclasses import FakeTensorMode

        from fastmim.config import load_config
        from fastmim.engine.build import build_objective
        from fastmim.engine.dry_step import built
        from fastmim.evaluate.mask_report import mask_report, save_mask_picture
    cfg = load_config(options.config, options.overrides)
    with FakeTensorMode():  # the weights of a giant are not needed
        objective = built(lambda: build_objective(cfg))
    report = mask_report(objective, seed=cfg.train.seed, epoch=options.epoch, count=options.samples)
    images = None if options.out is None else _images(cfg, objective, options.samples)
    write(f"{options.config}: {cfg.objective.name}, {report}\n")
    if options.out is not None and save_mask_picture(report, options.out, images, options.samples):
        over = "" if images is None else f" over {plural(len(images), 'image')}"
        write(f"\n{options.out}: {plural(options.samples, 'mask')}{over}, and AvgDist\n")
    return 0


def _images(cfg: Any, objective: Any, count: int) -> Any:
    """(N, 3, H, W) in [0, 1] of the config's images, evenly spread, as pictures show them; None without data.path."""
    from fastmim.data import build_loader
    from fastmim.data.reading import opening_of, reading_of
    from fastmim.evaluate.reconstruct import rgb_of, spread_images

    if cfg.data.path is None and cfg.data.file_list is None:
        return None
    how: dict[str, Any] = dict(train=False, micro_batch_size=1, num_workers=0, verify="none", loader="torchvision")
    reading = {**opening_of(cfg.data), **reading_of(cfg.data, "path", "file_list", "interpolation")}
    with closing(build_loader(img_size=objective.img_size, in_chans=cfg.model.in_chans, **reading, **how)) as loader:
        found = spread_images(loader, count)
    return None if found is None else rgb_of(found[0], cfg.output.bands)
