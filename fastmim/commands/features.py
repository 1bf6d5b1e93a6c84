"""``fastmim features``: what an encoder gives for every image of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastmim.wording import plural

from .configs import positive, takes_overrides
from .console import bar, shown_on_a_terminal, write
from .probe import check_overrides, data_of


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``features`` to the command line."""
    features = commands.add_parser("features", parents=[common], help="write an encoder's features of images")
    features.add_argument("source", metavar="RUN|ENCODER", help="a run's output folder, a step-… folder, or the "
                          "encoder.safetensors that a run or `fastmim convert` has written")
    features.add_argument("given", metavar="IMAGES", help="folder of images, nested or flat, tar shards, or a file")
    takes_overrides(features, "how the images are read: data.num_workers=8, data.value_range=…, data.alpha=…")
    features.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file; a .json of its name "
                          "has the names of the images, in its order")
    features.add_argument("--maps", action="store_true", help="also the token of every patch: (images, rows, columns, "
                          "channels)")
    features.add_argument("--layers", type=_numbers, metavar="LIST", help="blocks, as 6,12, or --layers=-4,-1 from the "
                          "end (default: the last)")
    features.add_argument("--pool", choices=("cls", "mean"), help="what stands for an image (default: the class token "
                          "of a ViT with key_bias, else the mean)")
    features.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is stored")
    features.add_argument("--labels", metavar="CSV", help="lines file,class (default: class folders, if there are)")
    features.add_argument("--batch", type=positive, metavar="N", default=64, help="images in a forward pass (default "
                          "64)")
    features.set_defaults(command=run_features)


def _numbers(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be numbers of blocks, such as 6,12") from None


def run_features(options: argparse.Namespace) -> int:
    """Write the features, name the images that are left out."""
    check_overrides(options.overrides, "features")
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.data.given import open_given
        from fastmim.data.reading import FROZEN, opening_of, reading_of
        from fastmim.engine.distributed import distributed
        from fastmim.engine.extract import extract_features
        from fastmim.engine.probe import encoder_facts, encoder_file

    with distributed() as world, bar() as told, encoder_file(Path(options.source)) as file:
        if world.size > 1:
            raise ValueError(f"features is for one process, not {world.size}: start it without a launcher")
        data = data_of(options.overrides, encoder_facts(file))
        index = open_given([options.given], **opening_of(data))
        done = extract_features(
            file,
            index,
            options.out,
            device=world.device,
            layers=options.layers,
            maps=options.maps,
            pool=options.pool,
            dtype=options.dtype,
            batch=options.batch,
            labels=options.labels,
            reading=reading_of(data, *FROZEN),
            called=options.source,
            told=told,
        )
    lines = [f"left out {path}: {reason}" for path, reason in done.bad.items()]
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in done.shapes.items())
    labels = "no labels" if done.classes is None else plural(len(done.classes), "class", "classes")
    counts = f"{plural(len(done.files), 'image')}, {labels}, {plural(len(done.bad), 'bad file')}"
    write("\n".join([*lines, f"{options.out}: {counts}; {shapes}"]) + "\n")
    return 0
