"""``fastmim data``: the demo's photographs, labelled digits, a check of images, their statistics, and shards."""

from __future__ import annotations

import argparse
from typing import Any

from fastmim.files import naming
from fastmim.wording import plural

from .configs import UNNORMALISED, takes_config, takes_overrides
from .console import bar, shown_on_a_terminal, write
from .statistics import data_stats


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``data`` and its commands to the command line."""
    data = commands.add_parser("data", help="make example images, check a folder, pack and index shards")
    data_commands = data.add_subparsers(metavar="COMMAND", required=True)
    demo = data_commands.add_parser("demo", parents=[common], help="write a few hundred real photograph tiles")
    demo.add_argument("folder", metavar="DIR", help="gets the folders train and val")
    demo.set_defaults(command=data_demo)
    digits = data_commands.add_parser("digits", parents=[common], help="write 5,000 labelled handwritten digits")
    digits.add_argument("folder", metavar="DIR", help="gets train/0 … 9 and val/0 … 9")
    digits.set_defaults(command=data_digits)
    check = data_commands.add_parser("check", parents=[common], help="decode every image, name the bad files")
    check.add_argument("folder", metavar="DIR", help="folder of images, nested or flat, or tar shards")
    takes_overrides(check, "such as model.in_chans=1, data.value_range=…")
    check.set_defaults(command=data_check)
    stats = data_commands.add_parser("stats", parents=[common], help="measure data.mean and data.std of data.path")
    takes_config(stats)
    stats.add_argument("--write", metavar="FILE", help="put them into this config, made on top of CONFIG if it is new")
    stats.set_defaults(command=data_stats)
    index = data_commands.add_parser("index", parents=[common], help="write the index beside every tar shard")
    index.add_argument("shards", metavar="SHARDS", help="folder of .tar files, one of them, or a-{000..127}.tar")
    index.set_defaults(command=data_index)
    pack = data_commands.add_parser("pack", parents=[common], help="write a folder of images into tar shards")
    pack.add_argument("folder", metavar="DIR", help="folder of images, nested or flat")
    pack.add_argument("target", metavar="TARGET", help="new folder for the shards, their indices and names.txt")
    takes_overrides(pack, "data.pixels=float32 model.in_chans=13 packs arrays and images of many bands, as "
                    "they are")
    pack.add_argument("--short-side", type=int, metavar="PX", help="make larger images this small (default: copy)")
    pack.add_argument("--quality", type=int, default=90, metavar="Q", help="of those JPEGs, 1 to 100 (default 90)")
    pack.add_argument("--shard-mb", type=float, default=1000, metavar="MB", help="size of a shard (default 1000)")
    pack.set_defaults(command=data_pack)
    clusters = data_commands.add_parser("clusters", parents=[common], help="fit clusters of colours (SimMIM's target)")
    clusters.add_argument("folder", metavar="DIR", help="folder of images, nested or flat, or tar shards")
    takes_overrides(clusters, "such as model.in_chans=1")
    clusters.add_argument("--out", required=True, metavar="FILE", help="safetensors file for objective.clusters")
    clusters.add_argument("--clusters", type=int, default=512, metavar="K", help="number of colours (default 512)")
    clusters.set_defaults(command=data_clusters)


def data_demo(options: argparse.Namespace) -> int:
    """Write the demo's photographs."""
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.data import make_demo

    counts = make_demo(options.folder)
    write(f"{options.folder}: {plural(counts.train, 'photograph')} in train, {counts.val} in val\n")
    return 0


def data_digits(options: argparse.Namespace) -> int:
    """Write the digits."""
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.data.digits import make_digits

    counts = make_digits(options.folder)
    write(f"{options.folder}: {plural(counts.train, 'digit')} in train, {plural(counts.val, 'digit')} in val\n")
    return 0


def data_check(options: argparse.Namespace) -> int:
    """Decode every image; status 1 where one is bad."""
    from fastmim.config import load_config
    from fastmim.data import check_images
    from fastmim.data.reading import opening_of, reading_of

    cfg = load_config(None, [*options.overrides, *UNNORMALISED])
    how = opening_of(cfg.data) | reading_of(cfg.data)
    usable, bad = check_images(options.folder, in_chans=cfg.model.in_chans, **how)
    lines = [f"{path}: {reason}" for path, reason in sorted(bad.items())]
    counts = f"{plural(usable, 'usable image')}, {plural(len(bad), 'bad file')}"
    write("\n".join([*lines, f"{options.folder}: {counts}"]) + "\n")
    return 1 if bad else 0


def data_clusters(options: argparse.Namespace) -> int:
    """Write clusters of the images' colours."""
    from fastmim.config import load_config
    from fastmim.data.reading import opening_of, reading_of
    from fastmim.evaluate.clusters import write_clusters

    cfg = load_config(None, [*UNNORMALISED, *options.overrides])
    how: dict[str, Any] = dict(encoder=cfg.model.encoder_kwargs(), seed=cfg.train.seed)
    how |= opening_of(cfg.data) | reading_of(cfg.data)
    with naming(options.out), bar() as progress:
        told = write_clusters(options.folder, options.out, clusters=options.clusters, progress=progress, **how)
    write(f"{options.out}: {told}\n")
    return 0


def data_index(options: argparse.Namespace) -> int:
    """Write the index beside every shard."""
    from fastmim.data import index_shards

    with naming(options.shards):
        counts = index_shards(options.shards)
    what = f"{plural(sum(counts.values()), 'image')} in {plural(len(counts), 'shard')}"
    write(f"{options.shards}: {what}, an .idx beside each\n")
    return 0


def data_pack(options: argparse.Namespace) -> int:
    """Write a folder of images into shards."""
    from fastmim.config import load_config
    from fastmim.data import pack_images
    from fastmim.data.reading import reading_of

    cfg = load_config(None, [*options.overrides, *UNNORMALISED])
    if options.overrides and cfg.data.pixels != "float32":
        raise ValueError(f"{options.overrides[0]}: says how files are read, and they are packed as they are; leave it "
                         "out, or give data.pixels=float32 too")  # fmt: skip
    with naming(options.target), bar() as progress:
        report = pack_images(
            options.folder,
            options.target,
            shard_bytes=round(options.shard_mb * 1e6),
            short_side=options.short_side,
            quality=options.quality,
            progress=progress,
            in_chans=cfg.model.in_chans,
            **reading_of(cfg.data),
        )
    lines = [f"left out {path}: {reason}" for path, reason in sorted(report.bad.items())]
    counts = f"{plural(report.images, 'image')} in {plural(len(report.shards), 'shard')}"
    written = f"{counts}, {report.total_bytes / 1e6:.1f} MB, every one read back; {plural(len(report.bad), 'bad file')}"
    write("\n".join([*lines, f"{options.target}: {written}"]) + "\n")
    return 0
